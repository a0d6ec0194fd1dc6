-- Twice a second a verifier looks for nodes that are late; it should not read the whole fleet for it.
CREATE INDEX attestations_due ON attestations (next_expected_at_ms) WHERE state = 'standing' AND silent_at_ms IS NULL;

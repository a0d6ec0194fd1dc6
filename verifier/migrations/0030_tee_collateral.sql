-- Collateral for quotes of trusted execution environments: each document that a verifier was given, once. Verdicts name
-- them by digest.
CREATE TABLE tee_collateral (
    sha256 TEXT PRIMARY KEY,
    document TEXT NOT NULL,
    given_at_ms BIGINT NOT NULL
);

-- Identities from before were digests of another form: each such node's next enrolment is an incident, which its operator
-- settles. Incidents from before cannot be settled: their EKs were not proven.
DELETE FROM incidents;

-- Who bound a node to its EK. An operator may name an EK beforehand:
-- `seen_at_ms` is NULL until its node comes with it. `ek_sha256` is of the EK's SubjectPublicKeyInfo from here on.
ALTER TABLE identities ADD COLUMN origin TEXT NOT NULL DEFAULT 'first-use';
ALTER TABLE identities ADD COLUMN bound_by TEXT;
ALTER TABLE identities ADD COLUMN seen_at_ms BIGINT;

-- An incident is open until an operator settles it. The same claim again counts, and makes no second one.
ALTER TABLE incidents ADD COLUMN ek_sha256 TEXT NOT NULL DEFAULT '';
ALTER TABLE incidents ADD COLUMN claims BIGINT NOT NULL DEFAULT 1;
ALTER TABLE incidents ADD COLUMN last_at_ms BIGINT NOT NULL DEFAULT 0;
ALTER TABLE incidents ADD COLUMN settlement TEXT;
ALTER TABLE incidents ADD COLUMN settled_by TEXT;
ALTER TABLE incidents ADD COLUMN settled_at_ms BIGINT;
CREATE INDEX incidents_by_claim ON incidents (node, ek_sha256);

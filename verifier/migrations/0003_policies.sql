-- Who signed a policy: a detached signature as JSON. None on policies of before, or where no keys are configured.
ALTER TABLE policies ADD COLUMN signature TEXT;

-- Every time that somebody made a policy the one that judges. Ids sort by time.
CREATE TABLE policy_approvals (
    id TEXT PRIMARY KEY,
    digest TEXT NOT NULL REFERENCES policies (digest),
    approved_by TEXT NOT NULL,
    approved_at_ms BIGINT NOT NULL
);
CREATE INDEX policy_approvals_by_digest ON policy_approvals (digest, approved_at_ms);
INSERT INTO policy_approvals (id, digest, approved_by, approved_at_ms)
    SELECT digest, digest, activated_by, activated_at_ms FROM active_policy;

-- What else a verdict depended on, as JSON: to reach it again offline.
ALTER TABLE evidence ADD COLUMN context TEXT;

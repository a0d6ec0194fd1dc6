-- The verifiers that share this database, one row a name. `run` is one process's life; `beat` grows while it lives, and
-- whoever sees it stand still removes the row.
CREATE TABLE verifiers (
    name TEXT PRIMARY KEY,
    run TEXT NOT NULL UNIQUE,
    beat BIGINT NOT NULL,
    joined_at_ms BIGINT NOT NULL
);

-- The keys that all of them have. `slot` is `site`.
CREATE TABLE verifier_keys (
    slot TEXT PRIMARY KEY,
    result_key TEXT NOT NULL,
    agent_key_sha256 TEXT NOT NULL
);

-- The run that drives the release. A run that is not in `verifiers` drives nothing: its releases are anybody's.
ALTER TABLE releases ADD COLUMN owner TEXT;
CREATE INDEX releases_by_node ON releases (node);

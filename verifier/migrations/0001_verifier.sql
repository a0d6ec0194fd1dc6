-- One agent's conversation each. `nonce` is there in state `enrolled` only, and whoever clears it has used it.
CREATE TABLE sessions (
    id TEXT PRIMARY KEY,
    node TEXT NOT NULL,
    state TEXT NOT NULL,
    ek_public TEXT NOT NULL,
    ak_public TEXT NOT NULL,
    lease TEXT NOT NULL,
    project TEXT NOT NULL,
    boot TEXT NOT NULL,
    proof_sha256 TEXT NOT NULL,
    challenge_expires_at_ms BIGINT NOT NULL,
    nonce TEXT,
    nonce_issued_at_ms BIGINT NOT NULL,
    nonce_expires_at_ms BIGINT NOT NULL,
    admission TEXT,
    created_at_ms BIGINT NOT NULL,
    expires_at_ms BIGINT NOT NULL
);
CREATE INDEX sessions_half_open ON sessions (state, created_at_ms);
CREATE INDEX sessions_by_node ON sessions (node, state, created_at_ms);

-- One EK one node, one node one EK.
CREATE TABLE identities (
    node TEXT PRIMARY KEY,
    ek_sha256 TEXT NOT NULL UNIQUE,
    bound_at_ms BIGINT NOT NULL,
    last_clock TEXT
);

CREATE TABLE incidents (
    id TEXT PRIMARY KEY,
    node TEXT NOT NULL,
    kind TEXT NOT NULL,
    detail TEXT NOT NULL,
    at_ms BIGINT NOT NULL
);
CREATE INDEX incidents_by_time ON incidents (at_ms);

CREATE TABLE policies (
    digest TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    document TEXT NOT NULL,
    added_by TEXT NOT NULL,
    added_at_ms BIGINT NOT NULL
);

-- `slot` is `site`: the one policy that judges now.
CREATE TABLE active_policy (
    slot TEXT PRIMARY KEY,
    digest TEXT NOT NULL REFERENCES policies (digest),
    activated_by TEXT NOT NULL,
    activated_at_ms BIGINT NOT NULL
);

-- Evidence with its verdict, and all that is needed to verify it again. `reported_at_ms` is set when isolation knows
-- of a bad verdict.
CREATE TABLE evidence (
    id TEXT PRIMARY KEY,
    session TEXT NOT NULL,
    node TEXT NOT NULL,
    lease TEXT NOT NULL,
    project TEXT NOT NULL,
    boot TEXT NOT NULL,
    received_at_ms BIGINT NOT NULL,
    body TEXT NOT NULL,
    body_sha256 TEXT NOT NULL,
    ek_public TEXT NOT NULL,
    ak_public TEXT NOT NULL,
    nonce TEXT NOT NULL,
    verdict TEXT NOT NULL,
    reasons TEXT NOT NULL,
    policy TEXT,
    result TEXT,
    admission TEXT,
    reported_at_ms BIGINT
);
CREATE INDEX evidence_by_node ON evidence (node, received_at_ms);
CREATE INDEX evidence_by_session ON evidence (session);

-- The release's journal: one row an admission, rewritten step by step.
CREATE TABLE releases (
    admission TEXT PRIMARY KEY,
    session TEXT NOT NULL,
    node TEXT NOT NULL,
    project TEXT NOT NULL,
    lease TEXT NOT NULL,
    boot TEXT NOT NULL,
    result TEXT NOT NULL,
    result_expires_at_ms BIGINT NOT NULL,
    step TEXT NOT NULL,
    step_at_ms BIGINT NOT NULL,
    created_at_ms BIGINT NOT NULL,
    address TEXT,
    sealed_grant TEXT,
    failure TEXT
);
CREATE INDEX releases_by_step ON releases (step);
CREATE INDEX releases_by_time ON releases (created_at_ms);

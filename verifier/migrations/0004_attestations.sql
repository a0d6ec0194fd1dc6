-- Admissions that are attested continuously: one row each, from the good verdict on. `state` is `standing`, `ending`
-- (isolation and imaging are being told) or `ended`. `sequence` grows with every renewal, so that of two verifiers
-- with an old view only one writes.
CREATE TABLE attestations (
    admission TEXT PRIMARY KEY,
    node TEXT NOT NULL,
    project TEXT NOT NULL,
    evidence TEXT NOT NULL,
    proof_sha256 TEXT NOT NULL,
    ek_public TEXT NOT NULL,
    ak_public TEXT NOT NULL,
    claims TEXT NOT NULL,
    pcrs TEXT NOT NULL,
    admitted_clock TEXT NOT NULL,
    created_at_ms BIGINT NOT NULL,
    state TEXT NOT NULL,
    policy TEXT NOT NULL,
    submod TEXT NOT NULL,
    sequence BIGINT NOT NULL,
    clock TEXT NOT NULL,
    ima TEXT,
    ima_entries BIGINT NOT NULL,
    warnings TEXT NOT NULL,
    last_seen_at_ms BIGINT,
    next_expected_at_ms BIGINT,
    expires_at_ms BIGINT NOT NULL,
    silent_at_ms BIGINT,
    reasons TEXT,
    ended_at_ms BIGINT
);
CREATE INDEX attestations_by_state ON attestations (state, expires_at_ms);
CREATE INDEX attestations_by_node ON attestations (node, created_at_ms);

-- Numbers that grow by one: `events`, `notices/<project>`. Whoever takes one holds the row until its transaction ends,
-- so numbers become visible in their order.
CREATE TABLE counters (
    name TEXT PRIMARY KEY,
    value BIGINT NOT NULL
);

-- What a project's nodes are told of each other. One notice an admission.
CREATE TABLE notices (
    project TEXT NOT NULL,
    sequence BIGINT NOT NULL,
    node TEXT NOT NULL,
    admission TEXT NOT NULL UNIQUE,
    ak_name TEXT NOT NULL,
    reason TEXT NOT NULL,
    at_ms BIGINT NOT NULL,
    PRIMARY KEY (project, sequence)
);

-- What people and programs are told, in order: the stream and the webhooks read it.
CREATE TABLE events (
    id BIGINT PRIMARY KEY,
    at_ms BIGINT NOT NULL,
    kind TEXT NOT NULL,
    project TEXT,
    node TEXT,
    admission TEXT,
    detail TEXT NOT NULL
);

-- How far each webhook's receiver has been told, and which verifier is telling it.
CREATE TABLE webhooks (
    url TEXT PRIMARY KEY,
    delivered BIGINT NOT NULL,
    owner TEXT NOT NULL,
    claimed_until_ms BIGINT NOT NULL
);

-- Tenants' secrets for their nodes, encrypted with a key that is not in the database.
CREATE TABLE tenant_secrets (
    lease TEXT NOT NULL,
    project TEXT NOT NULL,
    sealed TEXT NOT NULL,
    shares BIGINT NOT NULL,
    set_by TEXT NOT NULL,
    set_at_ms BIGINT NOT NULL,
    PRIMARY KEY (lease, project)
);

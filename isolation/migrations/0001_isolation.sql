-- Isolation's record. Text and bigint only, so that SQLite and PostgreSQL read the same; times in ms since the epoch.
CREATE TABLE projects (
    name TEXT PRIMARY KEY,
    created_ms BIGINT NOT NULL
);

CREATE TABLE verifier_keys (
    project TEXT NOT NULL REFERENCES projects (name),
    key_hex TEXT NOT NULL,
    PRIMARY KEY (project, key_hex)
);

CREATE TABLE networks (
    name TEXT PRIMARY KEY,
    project TEXT NOT NULL REFERENCES projects (name),
    vlan BIGINT NOT NULL UNIQUE
);

CREATE TABLE switches (
    name TEXT PRIMARY KEY,
    driver TEXT NOT NULL
);

CREATE TABLE nodes (
    name TEXT PRIMARY KEY,
    bmc TEXT NOT NULL,
    bmc_password_sealed TEXT NOT NULL,
    state TEXT NOT NULL,
    reason TEXT NOT NULL,
    since_ms BIGINT NOT NULL,
    boot TEXT,
    entry TEXT NOT NULL,
    entered_ms BIGINT NOT NULL,
    reset_time TEXT
);

CREATE TABLE nics (
    node TEXT NOT NULL REFERENCES nodes (name),
    name TEXT NOT NULL,
    position BIGINT NOT NULL,
    mac TEXT NOT NULL UNIQUE,
    switch TEXT NOT NULL REFERENCES switches (name),
    port TEXT NOT NULL,
    desired TEXT NOT NULL,
    observed TEXT,
    PRIMARY KEY (node, name),
    UNIQUE (switch, port)
);

CREATE TABLE leases (
    id TEXT PRIMARY KEY,
    project TEXT NOT NULL REFERENCES projects (name),
    node TEXT NOT NULL,
    network TEXT NOT NULL REFERENCES networks (name),
    created_ms BIGINT NOT NULL,
    ended_ms BIGINT
);

CREATE UNIQUE INDEX one_live_lease_a_node ON leases (node) WHERE ended_ms IS NULL;

CREATE TABLE admissions (
    id TEXT PRIMARY KEY,
    node TEXT NOT NULL,
    lease TEXT NOT NULL REFERENCES leases (id),
    boot TEXT NOT NULL,
    ak_name TEXT NOT NULL,
    expires_at_ms BIGINT NOT NULL,
    created_ms BIGINT NOT NULL,
    revoked TEXT
);

CREATE INDEX admissions_of_a_node ON admissions (node, created_ms);

CREATE TABLE events (
    id TEXT PRIMARY KEY,
    at_ms BIGINT NOT NULL,
    node TEXT,
    kind TEXT NOT NULL,
    detail TEXT NOT NULL
);

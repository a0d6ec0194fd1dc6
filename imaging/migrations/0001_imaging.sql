-- Projects, and the verifiers whose results they believe (JSON array of Ed25519 public keys, hexadecimal).
CREATE TABLE projects (
    name TEXT PRIMARY KEY,
    verifier_keys TEXT NOT NULL
);

-- Golden images: an index of what the store holds.
CREATE TABLE images (
    name TEXT PRIMARY KEY,
    project TEXT NOT NULL,
    virtual_bytes BIGINT NOT NULL,
    data_bytes BIGINT NOT NULL,
    sha256 TEXT NOT NULL,
    created_at_ms BIGINT NOT NULL
);

-- Disks. `state` is `making` until the clone's files exist, so that a lost clone is never replaced by an empty one.
CREATE TABLE disks (
    id TEXT PRIMARY KEY,
    lease TEXT NOT NULL UNIQUE,
    project TEXT NOT NULL,
    node TEXT NOT NULL,
    image TEXT NOT NULL REFERENCES images (name),
    state TEXT NOT NULL
);

CREATE TABLE gateways (
    project TEXT PRIMARY KEY,
    control_socket TEXT NOT NULL,
    portal TEXT NOT NULL,
    relay TEXT NOT NULL,
    subnet TEXT NOT NULL,
    router TEXT
);

-- Exports and the addresses that go with them. `phase` is cloned, exported or ending.
CREATE TABLE exports (
    admission TEXT PRIMARY KEY,
    lease TEXT NOT NULL UNIQUE,
    disk TEXT NOT NULL REFERENCES disks (id),
    project TEXT NOT NULL,
    node TEXT NOT NULL,
    target TEXT NOT NULL,
    initiator TEXT NOT NULL,
    address TEXT NOT NULL,
    chap_name TEXT NOT NULL,
    chap_secret TEXT NOT NULL,
    sealed_grant TEXT NOT NULL,
    phase TEXT NOT NULL,
    issued_at_ms BIGINT NOT NULL,
    expires_at_ms BIGINT NOT NULL,
    UNIQUE (project, address)
);

-- Admissions that ended, so that a replayed result cannot bring its export back. Kept until no such result is valid.
CREATE TABLE ended_admissions (
    admission TEXT PRIMARY KEY,
    until_ms BIGINT NOT NULL
);

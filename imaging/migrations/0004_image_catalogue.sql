-- Images have a key of their own, so that they can be renamed, and a store has layers and hash trees. What a store held
-- before cannot be served from now on: its images are imported anew, so the records of them go with their disks and exports.
DROP TABLE exports;
DROP TABLE disks;
DROP TABLE images;

-- The catalogue: a row before the store has anything of an image, and until it has nothing of it. `kind` is golden or
-- snapshot; `state` is importing, ready or deleting; `shared_with` and `tags` are JSON arrays.
CREATE TABLE images (
    key TEXT PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    project TEXT NOT NULL,
    kind TEXT NOT NULL,
    state TEXT NOT NULL,
    virtual_bytes BIGINT NOT NULL,
    data_bytes BIGINT NOT NULL,
    -- Of the whole disk, and the root of its hash tree; of golden images only.
    sha256 TEXT,
    root TEXT,
    -- The key of the image that its disk was made from; of snapshots, and as provenance of what they were flattened to.
    parent TEXT,
    shared_with TEXT NOT NULL DEFAULT '[]',
    public BIGINT NOT NULL DEFAULT 0,
    tags TEXT NOT NULL DEFAULT '[]',
    source TEXT NOT NULL,
    source_sha256 TEXT,
    made_by TEXT NOT NULL,
    created_at_ms BIGINT NOT NULL
);

-- Disks. `state` is `making` until the clone's files exist, so that a lost clone is never replaced by an empty one.
CREATE TABLE disks (
    id TEXT PRIMARY KEY,
    lease TEXT NOT NULL UNIQUE,
    project TEXT NOT NULL,
    node TEXT NOT NULL,
    image TEXT NOT NULL REFERENCES images (key),
    mac TEXT,
    state TEXT NOT NULL
);

-- As before.
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
    subject TEXT,
    supporting TEXT NOT NULL DEFAULT '[]',
    UNIQUE (project, address)
);

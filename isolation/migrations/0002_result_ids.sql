-- What each result's id was used for, once and for all: an admission, or a revocation that came first. Both insert here, so
-- that a revocation which overtakes its admission wins.
CREATE TABLE result_ids (
    id TEXT PRIMARY KEY,
    purpose TEXT NOT NULL
);

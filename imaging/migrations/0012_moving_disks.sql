-- Whether an export's disk is being given another place, of which its gateway may not have been told yet.
ALTER TABLE exports ADD COLUMN moving BIGINT NOT NULL DEFAULT 0;

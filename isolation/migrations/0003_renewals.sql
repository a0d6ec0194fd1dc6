-- What an admission's results were about (JSON of wire's agreement::Subject), so that renewals can be held to it. An
-- admission from before this migration has none: it stands until it expires, and is not renewed.
ALTER TABLE admissions ADD COLUMN subject TEXT;

-- Ids of the results that supported the one that made it, as a JSON array.
ALTER TABLE admissions ADD COLUMN supporting TEXT NOT NULL DEFAULT '[]';

ALTER TABLE admissions ADD COLUMN ended_ms BIGINT;

UPDATE admissions SET ended_ms = expires_at_ms WHERE revoked IS NOT NULL;

CREATE INDEX standing_admissions ON admissions (id) WHERE revoked IS NULL;

CREATE INDEX ended_admissions ON admissions (ended_ms) WHERE ended_ms IS NOT NULL;

-- When a result's id was used up, so that it can be forgotten when no result of that age is valid; not known of old ones.
ALTER TABLE result_ids ADD COLUMN used_ms BIGINT;

CREATE INDEX used_result_ids ON result_ids (used_ms) WHERE used_ms IS NOT NULL;

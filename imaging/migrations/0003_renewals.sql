-- What an export's results were about (JSON of wire's agreement::Subject), so that renewals can be held to it. An export
-- from before this migration has none: it stands until it expires, and is not renewed.
ALTER TABLE exports ADD COLUMN subject TEXT;

-- Ids of the results that supported the one that made it, as a JSON array.
ALTER TABLE exports ADD COLUMN supporting TEXT NOT NULL DEFAULT '[]';

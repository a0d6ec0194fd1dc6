-- Results of other verifiers that a release passes on with its own, as a JSON array.
ALTER TABLE releases ADD COLUMN supporting TEXT NOT NULL DEFAULT '[]';

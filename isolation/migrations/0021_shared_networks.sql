-- Projects beside a network's owner whose nodes may join it: a JSON array of names.
ALTER TABLE networks ADD COLUMN shared_with TEXT NOT NULL DEFAULT '[]';

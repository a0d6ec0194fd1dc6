-- Which CHAP algorithms a project's exports take: any or sha256.
ALTER TABLE gateways ADD COLUMN chap TEXT NOT NULL DEFAULT 'any';

-- Which boot the last verified quote was of, and how many resets of the machine isolation knew of then.
ALTER TABLE sessions ADD COLUMN machine_resets BIGINT;
ALTER TABLE identities ADD COLUMN last_boot TEXT;
ALTER TABLE identities ADD COLUMN last_machine_resets BIGINT;

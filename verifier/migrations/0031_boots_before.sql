-- The first quote of the boot that the last quote was of, and the last quote of the boot before it.
ALTER TABLE identities ADD COLUMN first_clock TEXT;
ALTER TABLE identities ADD COLUMN previous_clock TEXT;
ALTER TABLE identities ADD COLUMN previous_boot TEXT;
ALTER TABLE identities ADD COLUMN previous_machine_resets BIGINT;

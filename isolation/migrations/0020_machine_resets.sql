-- Resets of the machine that were ordered here, or that its BMC reported: a TPM that had more was reset by itself.
ALTER TABLE nodes ADD COLUMN machine_resets BIGINT NOT NULL DEFAULT 0;

-- Whether an attestation `leads` (it begins with a release, and isolation and imaging are told of its end) or `supports`
-- (a project's own verifier vouches beside the one that leads, and knows the admission by its own result's id).
ALTER TABLE attestations ADD COLUMN part TEXT NOT NULL DEFAULT 'leads';

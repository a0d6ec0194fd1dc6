-- Projects may share a gateway: each has a record of it, with the same control socket. So a node's address is its own among
-- all that are exported through one gateway.
ALTER TABLE exports ADD COLUMN gateway TEXT NOT NULL DEFAULT '';
UPDATE exports SET gateway = COALESCE(
    (SELECT control_socket FROM gateways WHERE gateways.project = exports.project), exports.project);
CREATE UNIQUE INDEX one_export_an_address ON exports (gateway, address);

-- The NIC that a disk's node asks for its address with; none if whoever asked for the disk did not say.
ALTER TABLE disks ADD COLUMN mac TEXT;

//! Files: durable writes, guarded memory maps, the checksum table file.

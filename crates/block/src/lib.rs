//! Units, geometry, extents, checksums, image digests and frames; pure.

//! Which files there are while volumes and snapshots come and go.

use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::sync::Arc;

use tidemark_export::{BlockDevice, Durability, RegistryError};

use super::{Mounted, SIZE, errno, names};
use crate::devices::MemoryDevice;

#[test]
fn volumes_and_snapshots_come_and_go_while_mounted() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let (root, snapshots) = (mounted.path(""), mounted.path(".snapshots"));
    assert_eq!(names(&root), [".snapshots", "data.img"]);
    assert_eq!(names(&snapshots), ["data"]);
    assert_eq!(names(&snapshots.join("data")), [""; 0]);
    let image = MemoryDevice::new(1 << 20);
    image.write(5, b"then", Durability::Volatile).unwrap();
    let registry = &mounted.registry;
    registry
        .add("data@3", "", Arc::new(image.read_only()))
        .unwrap();
    assert_eq!(names(&root), [".snapshots", "data.img"]);
    assert_eq!(names(&snapshots.join("data")), ["3.img"]);
    let path = snapshots.join("data/3.img");
    let mut read = [0; 4];
    let file = File::open(&path).unwrap();
    file.read_exact_at(&mut read, 5).unwrap();
    assert_eq!(&read, b"then");
    assert_eq!(
        file.metadata().unwrap().ino(),
        fs::metadata(&path).unwrap().ino()
    );
    for write in [
        OpenOptions::new().write(true),
        OpenOptions::new().append(true),
    ] {
        assert_eq!(errno(write.open(&path)), libc::EROFS);
    }
    assert!(file.set_len(0).is_err());
    // In use: whoever removes it must end its use first.
    let removed = registry.remove("data@3");
    assert!(matches!(
        removed,
        Err(RegistryError::InUse { clients: 1, .. })
    ));
    assert_eq!(mounted.server.disconnect("data@3"), 1);
    registry.remove("data@3").unwrap();
    let direct = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(&path);
    assert_eq!(direct.unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(errno(file.read_at(&mut [0; 512], 4096 * 7)), libc::ESTALE);
    drop(file);

    registry
        .add("new", "", Arc::new(MemoryDevice::new(8192)))
        .unwrap();
    assert_eq!(fs::metadata(mounted.path("new.img")).unwrap().len(), 8192);
    for missing in [
        "other.img",
        "new",
        ".img",
        "data@3.img",
        ".snapshots/other",
        ".snapshots/data/3.img",
    ] {
        let found = fs::metadata(mounted.path(missing));
        assert_eq!(found.unwrap_err().kind(), ErrorKind::NotFound, "{missing}");
    }
    assert_eq!(names(&root), [".snapshots", "data.img", "new.img"]);
}

#[test]
fn a_volume_taken_away_by_force_is_stale_and_another_of_its_name_shows_its_own_bytes() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let old = mounted.open(0);
    old.write_all_at(&[1; 8192], 0).unwrap();
    assert_eq!(mounted.server.disconnect("data"), 1);
    mounted.registry.remove("data").unwrap();
    let fresh = MemoryDevice::new(SIZE);
    fresh.write(0, &[2; 8192], Durability::Volatile).unwrap();
    mounted.registry.add("data", "", Arc::new(fresh)).unwrap();
    let new = mounted.open(0);
    let mut read = [0; 8192];
    new.read_exact_at(&mut read, 0).unwrap();
    assert!(read == [2; 8192]);
    assert_eq!(errno(old.write_at(&[3; 512], 0)), libc::ESTALE);
    assert_eq!(errno(old.sync_all()), libc::ESTALE);
    assert_eq!(errno(old.read_at(&mut [0; 512], 1 << 20)), libc::ESTALE);
    new.read_exact_at(&mut read, 0).unwrap();
    assert!(read == [2; 8192]);
}

#[test]
fn what_another_front_end_wrote_is_read_by_who_opens_the_file_next() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let mut read = [0; 5];
    for text in [b"first", b"later"] {
        mounted.device.write(0, text, Durability::Volatile).unwrap();
        mounted.open(0).read_exact_at(&mut read, 0).unwrap();
        assert_eq!(&read, text);
    }
}

use tidemark_block::{BlockCount, BlockSize, GenerationId, IntervalId};

use super::{super::pending::PendingWriter, *};

const VOLUME: VolumeId = VolumeId::from_bytes([1; 16]);

fn opened(dir: &Path) -> BaseTable {
    let geometry = Geometry::new(1 << 20, BlockSize::MIN).unwrap();
    BaseTable::open(&dir.join("table"), VOLUME, geometry).unwrap()
}

#[test]
fn an_interval_does_not_make_a_doubtful_table_sound() {
    let dir = tempfile::tempdir().unwrap();
    let pending = dir.path().join("pending");
    let key = PendingKey {
        volume: VOLUME,
        interval: IntervalId::from_bytes([2; 16]),
        base: GenerationId::new(3),
    };
    let mut entries = Vec::new();
    Entry::End(BlockCount::ZERO).encode(&mut entries);
    let mut writer = PendingWriter::create(&pending, key).unwrap();
    writer.append(&entries).unwrap();
    let table = opened(dir.path());
    for sound in [false, true] {
        table.set_sound(sound);
        table.advance(Some((&pending, key)), || Ok(())).unwrap();
        assert_eq!(table.is_sound(), sound);
    }
}

#[test]
fn a_table_that_a_failed_write_has_closed_is_opened_again_for_repair() {
    for stamp_is_lost in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        drop(opened(dir.path()));
        let table = opened(dir.path());
        assert!(table.is_sound());
        // The stamp can't be replaced.
        let stamp = dir.path().join("table.stamp");
        let in_the_way = dir.path().join("table.stamp.tmp");
        std::fs::create_dir(&in_the_way).unwrap();
        let base = GenerationId::new(1);
        table.table().sync_and_stamp(base).unwrap_err();
        assert!(!table.is_sound());
        assert!(table.steady().is_none());
        std::fs::remove_dir(&in_the_way).unwrap();
        if stamp_is_lost {
            std::fs::remove_file(&stamp).unwrap();
        }
        let repaired = table.to_repair().unwrap();
        assert!(!table.is_sound());
        repaired.sync_and_stamp(base).unwrap();
        table.set_sound(true);
        assert!(table.is_sound());
        assert_eq!(table.table().stamp(), base);
    }
}

#[test]
fn a_table_that_the_disk_cannot_read_gives_way_to_another_and_one_that_failed_otherwise_does_not() {
    let dir = tempfile::tempdir().unwrap();
    drop(opened(dir.path()));
    let table = opened(dir.path());
    let base = GenerationId::new(1);
    table.table().sync_and_stamp(base).unwrap();
    assert!(!table.failed(&io::ErrorKind::StorageFull.into()));
    assert!(table.is_sound());
    assert_eq!(table.to_repair().unwrap().stamp(), base);
    table.set_sound(true);
    assert!(table.failed(&io::Error::from_raw_os_error(5)));
    assert!(!table.is_sound());
    for _ in 0..2 {
        let another = table.to_repair().unwrap();
        assert_eq!(another.stamp(), GenerationId::ZERO);
    }
}

//! What a disk's first bytes say that it holds.

/// Bytes from the beginning that say it.
pub(crate) const HEAD_LEN: usize = 72 << 10;
const SECTOR: u64 = 512;

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Content {
    /// A filesystem, by the name of the kernel's driver.
    Filesystem(&'static str),
    /// A partition table.
    Partitions(Vec<Partition>),
    /// Something else that is known, and can't be mounted as it is.
    Other(&'static str),
    /// Nothing that is known here.
    Unknown,
}

/// A part of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Partition {
    /// From 1.
    pub(crate) number: u32,
    /// Bytes.
    pub(crate) offset: u64,
    /// Bytes.
    pub(crate) length: u64,
}

/// Bytes of the head at a place; none where it is shorter.
fn at(head: &[u8], offset: usize, length: usize) -> Option<&[u8]> {
    head.get(offset..offset.checked_add(length)?)
}

fn has(head: &[u8], offset: usize, magic: &[u8]) -> bool {
    at(head, offset, magic.len()) == Some(magic)
}

fn number(head: &[u8], offset: usize, length: usize) -> Option<u64> {
    let bytes = at(head, offset, length)?;
    let byte = |value: u64, byte: &u8| value << 8 | u64::from(*byte);
    Some(bytes.iter().rev().fold(0, byte))
}

/// Looks at the first [`HEAD_LEN`] bytes, or all where there are fewer.
pub(crate) fn recognize(head: &[u8]) -> Content {
    if has(head, 0, b"XFSB") {
        return Content::Filesystem("xfs");
    }
    if has(head, 0x10040, b"_BHRfS_M") {
        return Content::Filesystem("btrfs");
    }
    if has(head, 1080, &[0x53, 0xEF]) {
        // Its driver has ext2 and ext3 too.
        return Content::Filesystem("ext4");
    }
    if has(head, 0, b"LUKS\xBA\xBE") {
        return Content::Other("an encrypted disk (LUKS)");
    }
    if (0..4).any(|sector| has(head, sector * 512, b"LABELONE")) {
        return Content::Other("a physical volume of LVM");
    }
    if has(head, 4086, b"SWAPSPACE2") {
        return Content::Other("swap space");
    }
    if has(head, 512, b"EFI PART") {
        return Content::Partitions(gpt(head));
    }
    // Boot sectors of these end as a partition table does.
    let boots = [
        (3, &b"NTFS    "[..]),
        (3, b"EXFAT   "),
        (54, b"FAT"),
        (82, b"FAT32"),
    ];
    let is_boot = boots
        .iter()
        .any(|(offset, magic)| has(head, *offset, magic));
    if !is_boot && has(head, 510, &[0x55, 0xAA]) {
        let partitions = mbr(head);
        if !partitions.is_empty() {
            return Content::Partitions(partitions);
        }
    }
    Content::Unknown
}

fn partition(number: usize, first: u64, sectors: u64) -> Option<Partition> {
    Some(Partition {
        number: u32::try_from(number).ok()?,
        offset: first.checked_mul(SECTOR)?,
        length: sectors.checked_mul(SECTOR)?,
    })
}

/// The primary partitions of a table of PCs.
fn mbr(head: &[u8]) -> Vec<Partition> {
    /// Those that hold others.
    const EXTENDED: [u64; 3] = [0x05, 0x0F, 0x85];
    let entry = |n: usize| {
        let entry = 446 + 16 * n;
        let kind = number(head, entry + 4, 1)?;
        let (first, sectors) = (number(head, entry + 8, 4)?, number(head, entry + 12, 4)?);
        if kind == 0 || sectors == 0 || EXTENDED.contains(&kind) {
            return None;
        }
        partition(n + 1, first, sectors)
    };
    (0..4).filter_map(entry).collect()
}

/// The partitions of a GPT, as far as its entries lie in the head: all of them in what every tool makes.
fn gpt(head: &[u8]) -> Vec<Partition> {
    let field = |offset: usize, length| number(head, 512 + offset, length).unwrap_or(0);
    let (table, count, size) = (field(72, 8), field(80, 4), field(84, 4));
    let entry = |n: u64| {
        let from = table
            .checked_mul(SECTOR)?
            .checked_add(n.checked_mul(size)?)?;
        let from = usize::try_from(from).ok()?;
        let unused = at(head, from, 16)?.iter().all(|&byte| byte == 0);
        let (first, last) = (number(head, from + 32, 8)?, number(head, from + 40, 8)?);
        if unused || last < first {
            return None;
        }
        partition(usize::try_from(n).ok()? + 1, first, last - first + 1)
    };
    let fit = HEAD_LEN as u64 / size.max(128);
    (0..count.min(fit)).filter_map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(places: &[(usize, &[u8])]) -> Vec<u8> {
        let mut head = vec![0; HEAD_LEN];
        for (offset, bytes) in places {
            head[*offset..offset + bytes.len()].copy_from_slice(bytes);
        }
        head
    }

    #[test]
    fn what_a_disk_holds_is_known_by_its_magic_numbers() {
        use Content::{Filesystem, Other, Unknown};
        for (places, content) in [
            (&[(0, &b"XFSB"[..])][..], Filesystem("xfs")),
            (&[(1080, &[0x53, 0xEF])], Filesystem("ext4")),
            (&[(0x10040, b"_BHRfS_M")], Filesystem("btrfs")),
            (&[(0, b"LUKS\xBA\xBE")], Other("an encrypted disk (LUKS)")),
            (&[(512, b"LABELONE")], Other("a physical volume of LVM")),
            (&[(4086, b"SWAPSPACE2")], Other("swap space")),
            // A boot sector, and a table without an entry.
            (
                &[(3, b"NTFS    "), (510, &[0x55, 0xAA]), (450, &[7])],
                Unknown,
            ),
            (&[(510, &[0x55, 0xAA])], Unknown),
            (&[], Unknown),
        ] {
            assert_eq!(recognize(&head(places)), content, "{places:?}");
        }
        assert_eq!(recognize(b"XFS"), Unknown);
        assert_eq!(recognize(&[]), Unknown);
    }

    #[test]
    fn the_partitions_of_a_pc_are_found_but_not_those_that_hold_others() {
        let entry = |kind: u8, first: u32, sectors: u32| {
            let mut entry = vec![0x80, 0, 0, 0, kind, 0, 0, 0];
            entry.extend(first.to_le_bytes());
            entry.extend(sectors.to_le_bytes());
            entry
        };
        let disk = head(&[
            (510, &[0x55, 0xAA]),
            (446, &entry(0x83, 2048, 4096)),
            (462, &entry(0x05, 8192, 100)),
            (478, &entry(0x83, u32::MAX, u32::MAX)),
        ]);
        let found = |number, first: u64, sectors: u64| Partition {
            number,
            offset: first * SECTOR,
            length: sectors * SECTOR,
        };
        let most = u64::from(u32::MAX);
        let expected = vec![found(1, 2048, 4096), found(3, most, most)];
        assert_eq!(recognize(&disk), Content::Partitions(expected));
    }

    fn gpt_header(table: u64, count: u32, size: u32) -> Vec<u8> {
        let mut header = vec![0; 92];
        header[..8].copy_from_slice(b"EFI PART");
        header[72..80].copy_from_slice(&table.to_le_bytes());
        header[80..84].copy_from_slice(&count.to_le_bytes());
        header[84..88].copy_from_slice(&size.to_le_bytes());
        header
    }

    #[test]
    fn the_partitions_of_a_gpt_are_found_whatever_its_header_claims() {
        let entry = |first: u64, last: u64| {
            let mut entry = vec![0xAB; 32];
            entry.extend(first.to_le_bytes());
            entry.extend(last.to_le_bytes());
            entry
        };
        let header = gpt_header(2, 128, 128);
        let disk = head(&[
            (512, &header),
            (1024, &entry(2048, 4095)),
            (1024 + 256, &entry(8192, 8192)),
            // Backwards, and too far away.
            (1024 + 384, &entry(9, 8)),
            (1024 + 512, &entry(u64::MAX / 2, u64::MAX / 2)),
        ]);
        let expected = vec![
            Partition {
                number: 1,
                offset: 2048 * 512,
                length: 2048 * 512,
            },
            Partition {
                number: 3,
                offset: 8192 * 512,
                length: 512,
            },
        ];
        assert_eq!(recognize(&disk), Content::Partitions(expected));
        for (table, count, size) in [
            (u64::MAX, 9, 128),
            (2, u32::MAX, 0),
            (2, u32::MAX, u32::MAX),
        ] {
            let hostile = head(&[(512, &gpt_header(table, count, size))]);
            assert_eq!(recognize(&hostile), Content::Partitions(Vec::new()));
        }
    }
}

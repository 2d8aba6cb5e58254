//! The clients that people use. Where one is not installed its test says so and passes; under CI it fails.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use crate::client::TestServer;
use crate::devices::{FileDevice, MemoryDevice};

const SIZE: u64 = 64 << 20;

/// Whether the tool is there. With `CI=true` in the environment its absence is a failure.
pub(crate) fn require_tool(name: &str, package: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).any(|dir| dir.join(name).is_file());
    if !found {
        assert!(
            std::env::var_os("CI").is_none_or(|ci| ci != "true"),
            "{name} is missing: install {package}"
        );
        println!("skipped: {name} is not installed (Debian package {package})");
    }
    found
}

fn run(program: &str, args: &[&str]) -> String {
    let Output {
        status,
        stdout,
        stderr,
    } = Command::new(program).args(args).output().unwrap();
    let (stdout, stderr) = (
        String::from_utf8_lossy(&stdout),
        String::from_utf8_lossy(&stderr),
    );
    assert!(
        status.success(),
        "{program} {args:?}: {status}\n{stdout}\n{stderr}"
    );
    stdout.into_owned()
}

fn servers() -> [TestServer; 2] {
    let file = tempfile::tempfile().unwrap();
    file.set_len(SIZE).unwrap();
    [
        TestServer::new(MemoryDevice::new(SIZE)),
        TestServer::new(FileDevice::new(file).unwrap()),
    ]
}

/// An image with data, repeated data and holes.
fn image(path: &Path) {
    let mut bytes = vec![0; SIZE as usize];
    let mut state = 1u64;
    for (n, chunk) in bytes.chunks_mut(1 << 20).enumerate() {
        if n % 3 == 1 {
            continue;
        }
        for byte in chunk {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            *byte = (state >> 56) as u8;
        }
    }
    fs::write(path, bytes).unwrap();
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn nbdinfo_sees_everything_that_is_offered() {
    if !require_tool("nbdinfo", "libnbd-bin") {
        return;
    }
    for server in servers() {
        let info = run("nbdinfo", &["--json", &server.uri()]);
        for expected in [
            r#""protocol": "newstyle-fixed""#,
            r#""structured": true"#,
            r#""base:allocation""#,
            r#""can_cache": true"#,
            r#""can_df": true"#,
            r#""can_fast_zero": true"#,
            r#""can_flush": true"#,
            r#""can_fua": true"#,
            r#""can_multi_conn": true"#,
            r#""can_trim": true"#,
            r#""can_zero": true"#,
            r#""is_read_only": false"#,
            r#""block_size_minimum": 1"#,
            r#""block_size_maximum": 33554432"#,
            r#""description": "a test""#,
        ] {
            assert!(info.contains(expected), "{expected} in {info}");
        }
        let list = run(
            "nbdinfo",
            &[
                "--list",
                &format!("nbd+unix:///?socket={}", server.socket().display()),
            ],
        );
        assert!(list.contains(r#"export="data""#), "{list}");
        let mut client = server.client();
        client.write(1 << 20, &vec![1; 1 << 20]).unwrap();
        let map = run("nbdinfo", &["--map", &server.uri()]);
        let rows: Vec<Vec<&str>> = map
            .lines()
            .map(|line| line.split_whitespace().collect())
            .collect();
        assert_eq!(rows[0][..3], ["0", "1048576", "3"], "{map}");
        assert_eq!(rows[1][..3], ["1048576", "1048576", "0"], "{map}");
    }
}

#[test]
fn nbdcopy_takes_an_image_there_and_back() {
    if !require_tool("nbdcopy", "libnbd-bin") {
        return;
    }
    for server in servers() {
        let (there, back) = (
            server.dir.path().join("there"),
            server.dir.path().join("back"),
        );
        image(&there);
        for connections in ["--connections=1", "--connections=4"] {
            run(
                "nbdcopy",
                &[connections, "--flush", text(&there), &server.uri()],
            );
            run("nbdcopy", &[connections, &server.uri(), text(&back)]);
            assert!(fs::read(&there).unwrap() == fs::read(&back).unwrap());
            run("nbdcopy", &["--synchronous", &server.uri(), text(&back)]);
            assert!(fs::read(&there).unwrap() == fs::read(&back).unwrap());
        }
    }
}

#[test]
fn qemu_img_converts_compares_and_maps() {
    if !require_tool("qemu-img", "qemu-utils") {
        return;
    }
    for server in servers() {
        let (there, back) = (
            server.dir.path().join("there"),
            server.dir.path().join("back"),
        );
        image(&there);
        let uri = server.uri();
        assert!(run("qemu-img", &["info", &uri]).contains("64 MiB"));
        run(
            "qemu-img",
            &[
                "convert",
                "-n",
                "-m",
                "8",
                "-W",
                "-f",
                "raw",
                "-O",
                "raw",
                text(&there),
                &uri,
            ],
        );
        run(
            "qemu-img",
            &["compare", "-f", "raw", "-F", "raw", text(&there), &uri],
        );
        run(
            "qemu-img",
            &["convert", "-f", "raw", "-O", "raw", &uri, text(&back)],
        );
        assert!(fs::read(&there).unwrap() == fs::read(&back).unwrap());
        let map = run("qemu-img", &["map", "-f", "raw", "--output=json", &uri]);
        assert!(map.contains(r#""zero": true"#), "{map}");
    }
}

#[test]
fn qemu_io_reads_and_writes_unaligned_zeroes_discards_and_flushes() {
    if !require_tool("qemu-io", "qemu-utils") {
        return;
    }
    for server in servers() {
        let commands = [
            "write -P 7 513 100003",
            "read -P 7 513 100003",
            "read -P 0 0 513",
            "read -P 0 100516 1000",
            "write -z 1000 70000",
            "read -P 0 1000 70000",
            "read -P 7 71000 29516",
            "write -z -u 0 4M",
            "read -P 0 0 4M",
            "write -f -P 9 4096 4096",
            "read -P 9 4096 4096",
            "discard 1M 1M",
            "aio_write -P 1 2M 1M",
            "aio_write -P 2 4M 1M",
            "aio_flush",
            "read -P 1 2M 1M",
            "read -P 2 4M 1M",
            "write -P 3 8M 31M",
            "read -P 3 8M 31M",
            "flush",
        ];
        let uri = server.uri();
        let mut args = vec!["-f", "raw"];
        args.extend(commands.iter().flat_map(|command| ["-c", command]));
        args.push(&uri);
        let out = run("qemu-io", &args);
        assert!(!out.contains("failed") && !out.contains("error"), "{out}");
    }
}

#[test]
fn fio_verifies_what_it_wrote() {
    if !require_tool("fio", "fio") {
        return;
    }
    if !run("fio", &["--enghelp"])
        .lines()
        .any(|line| line.trim() == "nbd")
    {
        assert!(
            std::env::var_os("CI").is_none_or(|ci| ci != "true"),
            "this fio has no nbd engine"
        );
        println!("skipped: this fio has no nbd engine");
        return;
    }
    for server in servers() {
        let uri = format!("--uri={}", server.uri());
        for (depth, sizes) in [
            ("1", "--bsrange=512-64k"),
            ("32", "--bsrange=512-64k"),
            ("8", "--bs=1m"),
        ] {
            let depth = format!("--iodepth={depth}");
            let args = [
                "--name=verify",
                "--ioengine=nbd",
                &uri,
                "--rw=randwrite",
                "--size=48m",
                "--io_size=32m",
            ];
            let more = [
                &depth,
                sizes,
                "--verify=crc32c",
                "--do_verify=1",
                "--verify_fatal=1",
                "--randrepeat=1",
            ];
            let in_dir = format!("--aux-path={}", server.dir.path().display());
            run("fio", &[&args[..], &more[..], &[in_dir.as_str()]].concat());
        }
        let mixed = [
            "--name=mixed",
            "--ioengine=nbd",
            &uri,
            "--rw=randrw",
            "--bs=4k",
            "--iodepth=16",
            "--size=32m",
        ];
        run(
            "fio",
            &[&mixed[..], &["--io_size=32m", "--fsync=64"]].concat(),
        );
    }
}

#[test]
fn libnbd_in_python_gets_every_command_right() {
    // The module belongs to Debian's own Python.
    let python = "/usr/bin/python3";
    let there = Command::new(python)
        .args(["-c", "import nbd"])
        .output()
        .is_ok_and(|out| out.status.success());
    if !there {
        assert!(
            std::env::var_os("CI").is_none_or(|ci| ci != "true"),
            "install python3-libnbd"
        );
        println!("skipped: libnbd for Python is not installed (Debian package python3-libnbd)");
        return;
    }
    let script = r#"
import nbd, sys
h = nbd.NBD()
h.set_strict_mode(0)
h.add_meta_context("base:allocation")
h.connect_uri(sys.argv[1])
def fails(errno, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except nbd.Error as e:
        assert e.errno == errno, (e, errno)
    else:
        raise AssertionError("no error")
size = h.get_size()
assert h.get_structured_replies_negotiated()
h.pwrite(b"x" * 65536, 1, flags=nbd.CMD_FLAG_FUA)
assert h.pread(65536, 1) == b"x" * 65536
assert h.pread(65536, 1, flags=nbd.CMD_FLAG_DF) == b"x" * 65536
chunks = []
h.pread_structured(1 << 20, 0, lambda buf, offset, status, err: chunks.append((offset, len(buf), status)))
assert sum(c[1] for c in chunks) == 1 << 20, chunks
h.zero(1000, 100, flags=nbd.CMD_FLAG_NO_HOLE)
h.zero(1 << 20, 0, flags=nbd.CMD_FLAG_FAST_ZERO)
h.trim(4096, 0, flags=nbd.CMD_FLAG_FUA)
h.cache(4096, 0)
h.flush()
seen = []
def extents(context, offset, entries, err):
    assert context == "base:allocation"
    seen.append((offset, list(entries)))
h.block_status(1 << 20, 0, extents)
assert sum(seen[0][1][::2]) == 1 << 20, seen
seen.clear()
h.block_status(1 << 20, 0, extents, flags=nbd.CMD_FLAG_REQ_ONE)
assert len(seen[0][1]) == 2, seen
fails("EINVAL", h.pread, 2, size - 1)
fails("ENOSPC", h.pwrite, b"ab", size - 1)
fails("EINVAL", h.pread, 1, 0, flags=nbd.CMD_FLAG_NO_HOLE)
fails("EINVAL", h.trim, 2, size - 1)
cookies = [h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray([i] * 512)), 512 * i) for i in range(64)]
while h.aio_in_flight() > 0:
    h.poll(-1)
assert all(h.pread(512, 512 * i) == bytes([i]) * 512 for i in range(64))
h.shutdown()
print("all right")
"#;
    for server in servers() {
        assert_eq!(run(python, &["-c", script, &server.uri()]), "all right\n");
    }
}

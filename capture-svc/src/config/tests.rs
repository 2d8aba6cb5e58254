use super::*;

fn load(toml: &str, environment: &[(&str, &str)], flags: Flags) -> Result<Config, ConfigError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("capture.toml");
    std::fs::write(&path, toml).unwrap();
    let environment = environment
        .iter()
        .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
    Config::load(Some(&path), environment, flags)
}

#[test]
fn each_layer_overrides_the_one_before_it() {
    let toml = "interval_max = \"1m\"\nvault = \"http://toml:1\"\nspool_bytes_max = \"2GiB\"\n";
    let environment = [
        ("CAPTURE_INTERVAL_MAX", "2m"),
        ("CAPTURE_VAULT", "http://env:1"),
        ("CAPTURE_CONFIG", "not a key"),
        ("PATH", "/bin"),
    ];
    let flags = Flags {
        interval_max: Some("3m".into()),
        nbd: Some("unix:/run/nbd.sock, tcp:127.0.0.1:10809".into()),
        ..Flags::default()
    };
    let config = load(toml, &environment, flags).unwrap();
    assert_eq!(config.interval_max, Span::from_secs(180));
    assert_eq!(config.vault, "http://env:1");
    assert_eq!(config.spool_bytes_max, ByteSize::mib(2048));
    assert_eq!(config.nbd.0.len(), 2);
    assert_eq!(config.codec, CodecSetting::Auto);
}

#[test]
fn what_is_printed_loads_again() {
    let config = Config {
        nbd: NbdListens(vec!["unix:/run/nbd.sock".parse().unwrap()]),
        spool_full: SpoolFull::Stall,
        scrub_period: Span::from_secs(0),
        ..Config::default()
    };
    let again = load(&config.to_toml(), &[], Flags::default()).unwrap();
    assert_eq!(again, config);
}

#[test]
fn the_defaults_are_valid_and_as_documented() {
    Config::default().validate().unwrap();
    insta::assert_snapshot!(Config::default().to_toml());
}

#[test]
fn every_problem_is_named_with_its_key_and_source() {
    let toml = "interval_max = \"soon\"\nspeed = 3\nlisten = \"nowhere\"\nzstd_level = 77\n";
    let environment = [
        ("CAPTURE_CODEC", "lz4"),
        ("CAPTURE_COLOUR", "blue"),
        ("CAPTURE_NBD", "unix:relative"),
        ("CAPTURE_VAULT", "vault.example"),
        ("CAPTURE_SPOOL_BYTES_MAX", "12"),
    ];
    let error = load(toml, &environment, Flags::default()).unwrap_err();
    for (key, source) in [
        ("interval_max: ", "TOML"),
        ("speed: no such key", "TOML"),
        ("colour: no such key", "environment"),
        ("listen: ", "TOML"),
        ("codec: ", "environment"),
        ("nbd: ", "environment"),
    ] {
        assert!(
            error
                .problems
                .iter()
                .any(|p| p.starts_with(key) && p.contains(source)),
            "{key} {error}"
        );
    }
    for key in ["zstd_level: ", "vault: ", "spool_bytes_max: "] {
        assert!(
            error.problems.iter().any(|p| p.starts_with(key)),
            "{key} {error}"
        );
    }
    assert_eq!(error.problems.len(), 9, "{error}");
}

#[test]
fn a_missing_file_is_a_problem() {
    let error = Config::load(
        Some(Path::new("/nonexistent/capture.toml")),
        std::iter::empty(),
        Flags::default(),
    )
    .unwrap_err();
    assert!(error.to_string().contains("/nonexistent/capture.toml"));
}

#[test]
fn sizes_and_durations_read_as_they_are_written() {
    for (text, bytes) in [
        ("0", 0),
        ("4096", 4096),
        ("64KiB", 65536),
        ("3 MiB", 3 << 20),
        ("1TiB", 1 << 40),
    ] {
        assert_eq!(text.parse(), Ok(ByteSize::new(bytes)), "{text}");
    }
    for text in ["", "KiB", "1.5GiB", "-1", "1GB", "99999999999TiB"] {
        assert!(text.parse::<ByteSize>().is_err(), "{text}");
    }
    for bytes in [0, 1, 1024, 4097, 3 << 20, 5 << 40] {
        let size = ByteSize::new(bytes);
        assert_eq!(size.to_string().parse(), Ok(size));
    }
    assert!("15".parse::<Span>().is_err());
    for text in ["unix:relative", "tcp:host:1", "tcp:127.0.0.1", "/a/b", ""] {
        assert!(text.parse::<NbdListen>().is_err(), "{text}");
    }
}

use super::*;

fn load(toml: &str, environment: &[(&str, &str)], flags: Flags) -> Result<Config, ConfigError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vault.toml");
    std::fs::write(&path, toml).unwrap();
    let environment = environment.iter().map(|(k, v)| (k.into(), v.into()));
    Config::load(Some(&path), environment, flags)
}

#[test]
fn the_defaults_are_valid_and_survive_toml() {
    let config = Config::default();
    config.validate().unwrap();
    let text = config.to_toml();
    assert_eq!(load(&text, &[], Flags::default()), Ok(config));
    insta::assert_snapshot!(text);
}

#[test]
fn every_kind_of_value_is_read_from_every_layer() {
    let toml = "retain = 5\nreader_grace = \"3s\"\nlog_format = \"json\"\n";
    let environment = [("VAULT_PART_BYTES_MAX", "1MiB"), ("VAULT_STREAMS_MAX", "7")];
    let flags = Flags {
        retain: Some("9".into()),
        store_dir: Some("/store".into()),
        ..Flags::default()
    };
    let expected = Config {
        retain: 9,
        reader_grace: Span::from_secs(3),
        log_format: LogFormat::Json,
        part_bytes_max: ByteSize::mib(1),
        streams_max: 7,
        store_dir: "/store".into(),
        ..Config::default()
    };
    assert_eq!(load(toml, &environment, flags), Ok(expected));
}

#[test]
fn every_mistake_is_named_with_its_key_its_value_and_its_source() {
    let toml = "reader_grace = \"soon\"\nretian = 5\npart_bytes_max = \"100MiB\"\n";
    let environment = [
        ("VAULT_STREAM_IDLE_MAX", "0s"),
        ("VAULT_LOG_FORMAT", "xml"),
        ("VAULT_CACHE_BYTES_MAX", "8GB"),
    ];
    let flags = Flags {
        listen: Some("nowhere".into()),
        retain: Some("0".into()),
        ..Flags::default()
    };
    let text = load(toml, &environment, flags).unwrap_err().to_string();
    let (before, _) = text.split_once("/vault.toml").unwrap();
    let dir = before.rsplit('(').next().unwrap();
    insta::assert_snapshot!(text.replace(dir, "DIR"));
}

#[test]
fn variables_of_kubernetes_and_of_other_vaults_are_left_alone() {
    for key in [
        "port",
        "port_7402_tcp_addr",
        "service_host",
        "addr",
        "token",
        "tls_server_name",
    ] {
        assert!(Config::is_foreign(key), "{key}");
    }
    for key in ["retain", "retian", "listen", "tls_cert"] {
        assert!(!Config::is_foreign(key), "{key}");
    }
}

#[test]
fn periods_that_no_clock_can_count_are_refused() {
    for key in ["scrub_period", "maintenance_period"] {
        for (period, holds) in [
            ("10years", true),
            ("10years 1s", false),
            ("900years", false),
        ] {
            let loaded = load(&format!("{key} = \"{period}\"\n"), &[], Flags::default());
            assert_eq!(loaded.is_ok(), holds, "{key} = {period}");
            if let Err(error) = loaded {
                assert!(error.to_string().contains("to 10years"), "{error}");
            }
        }
    }
}

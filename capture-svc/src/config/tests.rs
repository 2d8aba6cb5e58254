use super::*;

fn load(toml: &str, environment: &[(&str, &str)], flags: Flags) -> Result<Config, ConfigError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("capture.toml");
    std::fs::write(&path, toml).unwrap();
    let environment = environment.iter().map(|(k, v)| (k.into(), v.into()));
    Config::load(Some(&path), environment, flags)
}

#[test]
fn every_kind_of_value_is_read_from_every_layer() {
    let toml = "interval_max = \"1m\"\nvault = \"http://localhost:1\"\nspool_bytes_max = \"2GiB\"\nvolumes_max = 3\n";
    let environment = [
        ("CAPTURE_INTERVAL_MAX", "2m"),
        ("CAPTURE_VAULT", "http://localhost:2"),
        ("CAPTURE_SNAPSHOTS_MAX", "5"),
        ("CAPTURE_SPOOL_FULL", "stall"),
        ("PATH", "/bin"),
    ];
    let flags = Flags {
        interval_max: Some("3m".into()),
        nbd: Some("unix:/run/nbd.sock, tcp:127.0.0.1:10809".into()),
        zstd_level: Some("9".into()),
        ..Flags::default()
    };
    let config = load(toml, &environment, flags).unwrap();
    let expected = Config {
        interval_max: Span::from_secs(180),
        vault: "http://localhost:2".to_owned(),
        spool_bytes_max: ByteSize::mib(2048),
        volumes_max: 3,
        snapshots_max: 5,
        spool_full: SpoolFull::Stall,
        nbd: NbdListens(vec![
            "unix:/run/nbd.sock".parse().unwrap(),
            "tcp:127.0.0.1:10809".parse().unwrap(),
        ]),
        zstd_level: 9,
        ..Config::default()
    };
    assert_eq!(config, expected);
}

#[test]
fn what_is_printed_loads_again() {
    let config = Config {
        nbd: NbdListens(vec!["unix:/run/nbd.sock".parse().unwrap()]),
        spool_full: SpoolFull::Stall,
        scrub_period: Span::from_secs(0),
        schedule: "30 2 * * MON-FRI Europe/Berlin".parse().unwrap(),
        quiesce_pre: "fsfreeze -f /data".into(),
        quiesce_post: "fsfreeze -u /data".into(),
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
fn every_mistake_is_named_with_its_key_its_value_and_its_source() {
    let toml = "interval_max = \"soon\"\nspeed = 3\nzstd_level = 77\nnbd = 7\n";
    let environment = [
        ("CAPTURE_CODEC", "lz4"),
        ("CAPTURE_COLOUR", "blue"),
        ("CAPTURE_SPOOL_BYTES_MAX", "12"),
    ];
    let flags = Flags {
        listen: Some("nowhere".into()),
        vault: Some("vault.example".into()),
        ..Flags::default()
    };
    let error = load(toml, &environment, flags).unwrap_err();
    let dir = dir_of(&error);
    insta::assert_snapshot!(error.to_string().replace(&dir, "DIR"));
}

/// The temporary directory that the problems of the file name.
fn dir_of(error: &ConfigError) -> String {
    let text = error.to_string();
    let (before, _) = text.split_once("/capture.toml").unwrap();
    before.rsplit('(').next().unwrap().to_owned()
}

#[test]
fn addresses_of_nbd_are_absolute_paths_or_tcp_with_a_port() {
    for text in ["unix:relative", "tcp:host:1", "tcp:127.0.0.1", "/a/b", ""] {
        assert!(text.parse::<NbdListen>().is_err(), "{text}");
    }
}

#[test]
fn commands_are_lines_for_the_shell_or_lists_of_words_and_come_in_pairs() {
    let toml = "quiesce_pre = [\"/bin/freeze\", \"a b\"]\n";
    let environment = [("CAPTURE_QUIESCE_POST", "thaw $TIDEMARK_VOLUME")];
    let config = load(toml, &environment, Flags::default()).unwrap();
    assert_eq!(config.quiesce_pre.words(), ["/bin/freeze", "a b"]);
    assert_eq!(
        config.quiesce_post.words(),
        ["/bin/sh", "-c", "thaw $TIDEMARK_VOLUME"]
    );
    let error = load(toml, &[], Flags::default()).unwrap_err();
    assert!(error.to_string().contains("together with quiesce_post"));
}

#[test]
fn a_schedule_has_a_time_zone_and_keeps_to_its_clock_changes() {
    for text in [
        "0 3 * * *",
        "0 3 * * * Nowhere/Else",
        "61 * * * * UTC",
        "daily",
    ] {
        assert!(text.parse::<Schedule>().is_err(), "{text}");
    }
    let hour = 3_600_000;
    let schedule: Schedule = "0 3 * * * Europe/Berlin".parse().unwrap();
    // 2026-10-24 12:00 UTC: the next 3 o'clock is 2 o'clock UTC, after the clocks were set back.
    let noon = 1_792_843_200_000;
    assert_eq!(schedule.next_after(noon), Some(noon + 14 * hour));
    assert_eq!(
        schedule.next_after(noon + 14 * hour),
        Some(noon + 38 * hour)
    );
    assert_eq!(
        schedule.next_after(noon - 24 * hour),
        Some(noon - 11 * hour)
    );
    assert_eq!(Schedule::default().next_after(noon), None);
}

#[test]
fn plain_text_leaves_the_machine_only_where_that_is_allowed() {
    for (key, value) in [
        ("listen", "'0.0.0.0:7401'"),
        ("vault", "'http://vault.example.com:7402'"),
        ("nbd", "'tcp:10.0.0.1:10809'"),
    ] {
        let toml = format!("{key} = {value}\n");
        let error = load(&toml, &[], Flags::default()).unwrap_err();
        assert_eq!(error.problems.len(), 1, "{error}");
        assert!(error.problems[0].starts_with(key), "{error}");
        assert!(error.problems[0].contains("allow_plain_text"), "{error}");
        let toml = format!("{toml}allow_plain_text = true\n");
        load(&toml, &[], Flags::default()).unwrap();
    }
    for vault in ["http://127.0.0.1:1", "http://[::1]:1", "http://localhost:1"] {
        load(&format!("vault = '{vault}'\n"), &[], Flags::default()).unwrap();
    }
}

#[test]
fn an_https_vault_takes_a_ca_and_certificates_take_their_keys() {
    let of = |toml: &str| load(toml, &[], Flags::default());
    let told = |toml: &str| of(toml).unwrap_err().problems.join("\n");
    let vault = "vault = 'https://vault.example.com:7402'\n";
    assert!(told(vault).starts_with("vault_ca"));
    assert!(told("tls_cert = 'a'\nidentities = 'i'\n").starts_with("tls_key"));
    assert!(told("tls_cert = 'a'\ntls_key = 'k'\n").starts_with("identities"));
    assert!(told("vault_key = 'k'\n").starts_with("vault_key"));
    assert!(told("tls_ca = 'c'\n").starts_with("tls_ca"));
    let own = "tls_cert = 'a'\ntls_key = 'k'\ntls_ca = 'c'\nidentities = 'i'\n";
    let config = of(&format!("{vault}{own}listen = '0.0.0.0:7401'\n")).unwrap();
    let files = config.dialer().files;
    assert_eq!(files.ca, Some("c".into()));
    assert_eq!(files.certificate, Some(("a".into(), "k".into())));
    let config = of(&format!("{vault}{own}vault_token_file = 't'\n")).unwrap();
    assert_eq!(config.dialer().files.certificate, None);
}

#[test]
fn what_quiesces_one_volume_is_read_from_every_layer_and_the_rest_is_as_for_all() {
    const FILE: &str = "quiesce_pre = \"freeze\"\nquiesce_post = \"thaw\"\n[quiesce.db]\npre = [\"/bin/pg\", \"a b\"]\n\
                        post = \"pg-thaw\"\ntimeout = \"30s\"\n[quiesce.logs]\npre = \"\"\npost = \"\"\nfailure = \"skip\"\n";
    const LINE: &str = "{ db = { pre = \"from line\", post = \"x\" } }";
    let told = |config: &Config, volume: &str| {
        let own = config.quiescing(volume);
        let words = |command: &CommandLine| command.words().join(" ");
        let seconds = own.timeout.as_secs();
        (
            words(own.pre),
            words(own.post),
            seconds,
            own.failure.as_str(),
        )
    };
    let as_told = |pre: &str, post: &str, seconds, failure| {
        (pre.to_owned(), post.to_owned(), seconds, failure)
    };
    let config = load(FILE, &[], Flags::default()).unwrap();
    assert_eq!(
        told(&config, "db"),
        as_told("/bin/pg a b", "/bin/sh -c pg-thaw", 30, "cut")
    );
    assert!(config.quiescing("logs").pre.is_empty());
    assert_eq!(config.quiescing("logs").failure, QuiesceFailure::Skip);
    let other = as_told("/bin/sh -c freeze", "/bin/sh -c thaw", 5, "cut");
    assert_eq!(told(&config, "other"), other);
    assert_eq!(
        load(&config.to_toml(), &[], Flags::default()).unwrap(),
        config
    );

    let line = [("CAPTURE_QUIESCE", LINE)];
    let flag = Flags {
        quiesce: Some("db.timeout = \"9s\"".into()),
        ..Flags::default()
    };
    let from_line = as_told("/bin/sh -c from line", "/bin/sh -c x", 5, "cut");
    for file in ["", FILE] {
        let config = load(file, &line, Flags::default()).unwrap();
        assert_eq!(told(&config, "db"), from_line);
        let config = load(file, &line, flag.clone()).unwrap();
        assert_eq!(config.quiescing("db").timeout.as_secs(), 9);
    }
}

#[test]
fn every_mistake_in_what_quiesces_a_volume_is_named_at_once() {
    let file = "[quiesce.db]\npre = \"freeze\"\ntimeout = \"soon\"\nspeed = 3\n[quiesce.logs]\nfailure = \"never\"\ntimeout = \"0s\"\n";
    let error = load(file, &[], Flags::default()).unwrap_err();
    let [told] = &error.problems[..] else {
        panic!("{error}")
    };
    for problem in [
        "/capture.toml): ",
        "db.speed = 3: no such key; there are pre, post, timeout and failure",
        "db.timeout = \"soon\": \"soon\" is no length of time",
        "db.pre must be given together with db.post: what freezes must be let go on",
        "logs.failure = \"never\": unknown variant",
        "logs.timeout must be above 0s",
    ] {
        assert!(told.contains(problem), "{problem}: {told}");
    }
    for line in ["pg", "{ db = 7 }", "{ db"] {
        let error = load("", &[("CAPTURE_QUIESCE", line)], Flags::default()).unwrap_err();
        let told = error.to_string();
        assert!(
            told.contains("(CAPTURE_QUIESCE)") && told.contains("VOLUME"),
            "{told}"
        );
    }
}

#[test]
fn traces_go_where_a_url_says_and_what_is_secret_not_in_plain_text() {
    let told = |toml: &str| match load(toml, &[], Flags::default()) {
        Ok(_) => String::new(),
        Err(error) => error.problems.join("\n"),
    };
    let far = "otlp_endpoint = 'http://collector.example.com:4317'\n";
    let headers = "otlp_headers_file = '/etc/headers'\n";
    for good in [
        "otlp_endpoint = 'http://127.0.0.1:4317'\ntrace_sample_ratio = 0.25\n",
        "otlp_endpoint = 'https://collector.example.com:4317'\notlp_ca = '/ca.pem'\ntrace_sample_ratio = 1\n",
        &format!("otlp_endpoint = 'http://[::1]:4317'\n{headers}"),
        &format!("{far}{headers}allow_plain_text = true\n"),
        far,
    ] {
        assert_eq!(told(good), "", "{good}");
    }
    for (bad, problem) in [
        (
            "otlp_endpoint = 'collector:4317'\n".to_owned(),
            "must be a URL like",
        ),
        (
            "otlp_endpoint = 'ftp://collector'\n".to_owned(),
            "must be a URL like",
        ),
        (format!("{far}otlp_ca = 'ca.pem'\n"), "otlp_ca = \"ca.pem\""),
        (format!("{far}{headers}"), "in plain text"),
        (
            "trace_sample_ratio = 1.5\n".to_owned(),
            "1.5 is no part of all traces",
        ),
        (
            "trace_sample_ratio = 'half'\n".to_owned(),
            "half is no part of all traces",
        ),
        (
            "trace_sample_ratio = true\n".to_owned(),
            "no part of all traces",
        ),
    ] {
        let told = told(&bad);
        assert!(
            told.contains(problem) && !told.contains('\n'),
            "{bad}: {told}"
        );
    }
    // Variables that are meant for everybody stop no start.
    let ca = ("OTEL_EXPORTER_OTLP_CERTIFICATE", "ca.pem");
    for (endpoint, used) in [
        ("collector:4317", ""),
        ("http://collector:4317", "http://collector:4317"),
    ] {
        let environment = [("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint), ca];
        let config = load("", &environment, Flags::default()).unwrap();
        assert_eq!(config.otlp_endpoint, used);
        assert!(config.otlp_ca.as_os_str().is_empty());
    }
}

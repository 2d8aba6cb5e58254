//! What both services tell of themselves.

use std::time::{SystemTime, UNIX_EPOCH};

use super::Reading;

crate::families! {
    /// Families of both services.
    pub COMMON:
    /// The program that runs, always 1.
    BUILD_INFO = "tidemark_build_info", Gauge, None, [service, version];
    /// When the service started, since the Unix epoch.
    PROCESS_START_TIME = "process_start_time_seconds", Gauge, Seconds, [];
    /// When the certificates end that the service uses, by configuration key: the first of a chain, the last of several CAs.
    CERTIFICATE_NOT_AFTER = "tidemark_certificate_not_after_timestamp_seconds", Gauge, Seconds, [certificate];
    /// Open connections of the control interface.
    CONNECTIONS = "tidemark_connections", Gauge, None, [];
    /// Connections that were turned away: there were as many as there may be, or too many open files.
    CONNECTIONS_REFUSED = "tidemark_connections_refused_total", Counter, None, [];
    /// Calls that have ended, by what became of them: OK, CANCELLED, or the reason code of the error.
    CALLS = "tidemark_calls_total", Counter, None, [call, result];
}

/// A service that runs.
#[derive(Debug, Clone, Copy)]
pub struct Process {
    service: &'static str,
    version: &'static str,
    started: SystemTime,
}

impl Process {
    /// It starts now.
    #[must_use]
    pub fn new(service: &'static str, version: &'static str) -> Self {
        Self {
            service,
            version,
            started: SystemTime::now(),
        }
    }

    /// Tells of itself.
    pub fn read(&self, reading: &mut Reading) {
        reading.add(&BUILD_INFO, &[self.service, self.version], 1);
        let since = self.started.duration_since(UNIX_EPOCH);
        let started = since.unwrap_or_default().as_secs_f64();
        reading.add(&PROCESS_START_TIME, &[], started);
    }
}

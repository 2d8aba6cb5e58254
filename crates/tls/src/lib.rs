//! TLS between all parties, and the gate that every call to a service goes through.
//!
//! Inwards: [`Gate`] holds the service's certificate, the CAs of its clients and the file of identities, and reads them
//! again when they change; [`Shield`] stands before the gRPC services, finds out who calls, and lets through what the
//! rules allow. Outwards: [`Dialer`] connects to a service, with a certificate or a token. Both sides say why they
//! refuse the other.
//!
//! TLS is 1.3 by rustls with aws-lc, and nothing else.

mod dialer;
mod expiry;
mod files;
mod gate;
mod limit;
mod own;
mod peer;
mod reasons;
mod settings;
mod shield;

pub use dialer::{Bearer, Dialer, DialerFiles, Line, dial_lazily, is_loopback_url, is_service_url};
pub use expiry::{Ends, OwnCertificate, OwnCertificates, Purpose, Standing, Validity};
pub use files::{FileError, random};
pub use gate::{Gate, GateFiles, Reloaded};
pub use own::dial_own;
pub use peer::Peer;
pub use reasons::{linger, told};
pub use settings::GateSettings;
pub use shield::{ADMISSION_MAX, Caller, Shield, ShieldLayer, caller};

//! A small site's own CA: a folder with the CA's certificate and key, those of everybody, and the file of identities.
//!
//! Certificates say who somebody is, and nothing more; the file of identities says what they may do. So a right is taken
//! away by a line of a file, and no certificate has to be revoked.

mod authority;
mod folder;

pub use authority::{Authority, Issued, Subject, VALID_DEFAULT};
pub use folder::{Folder, IDENTITIES};

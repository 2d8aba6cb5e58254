//! The handshake after the greeting, as a state machine without I/O: one option in, bytes and a decision out.

use std::sync::Arc;

use super::limits::REQUEST_PAYLOAD_MAX;
use super::option::{self, InfoRequest, MetaRequest, OptionRequest};
use super::wire::{
    BASE_ALLOCATION, BASE_ALLOCATION_ID, NBD_FLAG_C_FIXED_NEWSTYLE, NBD_FLAG_C_NO_ZEROES,
    NBD_FLAG_CAN_MULTI_CONN, NBD_FLAG_HAS_FLAGS, NBD_FLAG_READ_ONLY, NBD_FLAG_SEND_CACHE,
    NBD_FLAG_SEND_DF, NBD_FLAG_SEND_FAST_ZERO, NBD_FLAG_SEND_FLUSH, NBD_FLAG_SEND_FUA,
    NBD_FLAG_SEND_TRIM, NBD_FLAG_SEND_WRITE_ZEROES, NBD_INFO_DESCRIPTION, NBD_INFO_NAME,
    NBD_REP_ACK, NBD_REP_ERR_INVALID, NBD_REP_ERR_SHUTDOWN, NBD_REP_ERR_UNKNOWN, NBD_REP_ERR_UNSUP,
};
use crate::exports::{ConnectedClient, Export, Exports};

/// The smallest request, in bytes: any byte range is served.
pub const BLOCK_SIZE_MIN: u32 = 1;

/// Zero bytes after the answer to `NBD_OPT_EXPORT_NAME`, unless `NO_ZEROES` was agreed upon.
const EXPORT_NAME_PADDING: usize = 124;

/// What the handshake has agreed upon so far.
#[derive(Debug)]
pub struct Negotiation {
    no_zeroes: bool,
    structured_replies: bool,
    /// The export for which `base:allocation` was selected.
    base_allocation_for: Option<String>,
}

/// What to do once the reply's bytes are sent.
#[derive(Debug)]
pub enum Decision {
    /// Read the next option.
    Continue,
    /// The handshake is over: serve this client.
    Transmit(Agreement),
    /// Close the connection.
    Close,
}

/// What transmission stands on.
#[derive(Debug)]
pub struct Agreement {
    /// The client's use of its export.
    pub client: ConnectedClient,
    /// Reads are answered by structured replies.
    pub structured_replies: bool,
    /// `BLOCK_STATUS` may be asked, in the context `base:allocation`.
    pub base_allocation: bool,
}

impl Negotiation {
    /// Begins with the client's flags. `None` where the client asks for what we don't know, or does not speak fixed
    /// newstyle: close.
    #[must_use]
    pub fn begin(client_flags: u32) -> Option<Self> {
        let known = NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES;
        if client_flags & !known != 0 || client_flags & NBD_FLAG_C_FIXED_NEWSTYLE == 0 {
            return None;
        }
        Some(Self {
            no_zeroes: client_flags & NBD_FLAG_C_NO_ZEROES != 0,
            structured_replies: false,
            base_allocation_for: None,
        })
    }

    /// Answers one option: appends the bytes to send to `out`.
    pub fn answer(
        &mut self,
        exports: &dyn Exports,
        option: u32,
        data: &[u8],
        out: &mut Vec<u8>,
    ) -> Decision {
        let Ok(request) = option::decode(option, data) else {
            if option == super::wire::NBD_OPT_EXPORT_NAME {
                return Decision::Close;
            }
            option::encode_reply(out, option, NBD_REP_ERR_INVALID, &[b"malformed option"]);
            return Decision::Continue;
        };
        match request {
            OptionRequest::ExportName(name) => self.export_name(exports, name, out),
            OptionRequest::Abort => {
                option::encode_reply(out, option, NBD_REP_ACK, &[]);
                Decision::Close
            }
            OptionRequest::List => {
                for export in exports.list() {
                    option::encode_server(out, export.name(), export.description());
                }
                option::encode_reply(out, option, NBD_REP_ACK, &[]);
                Decision::Continue
            }
            OptionRequest::Info(request) => {
                self.info(exports, option, &request, out);
                Decision::Continue
            }
            OptionRequest::Go(request) => self.go(exports, option, &request, out),
            OptionRequest::StructuredReply => {
                self.structured_replies = true;
                option::encode_reply(out, option, NBD_REP_ACK, &[]);
                Decision::Continue
            }
            OptionRequest::ListMetaContext(request) => {
                self.list_meta_context(exports, option, &request, out);
                Decision::Continue
            }
            OptionRequest::SetMetaContext(request) => {
                self.set_meta_context(exports, option, &request, out);
                Decision::Continue
            }
            OptionRequest::Unknown => {
                option::encode_reply(out, option, NBD_REP_ERR_UNSUP, &[]);
                Decision::Continue
            }
        }
    }

    fn export_name(&self, exports: &dyn Exports, name: &str, out: &mut Vec<u8>) -> Decision {
        // This option has no way to say no, other than closing.
        let Some(client) = exports.find(name).and_then(|export| export.connect().ok()) else {
            return Decision::Close;
        };
        let export = client.export();
        out.extend_from_slice(&export.device().length().to_be_bytes());
        out.extend_from_slice(&self.transmission_flags(export).to_be_bytes());
        if !self.no_zeroes {
            out.extend_from_slice(&[0; EXPORT_NAME_PADDING]);
        }
        self.transmit(name, client)
    }

    fn go(
        &self,
        exports: &dyn Exports,
        option: u32,
        request: &InfoRequest<'_>,
        out: &mut Vec<u8>,
    ) -> Decision {
        let Some(export) = self.info_replies(exports, option, request, out) else {
            return Decision::Continue;
        };
        match export.connect() {
            Ok(client) => {
                option::encode_reply(out, option, NBD_REP_ACK, &[]);
                self.transmit(request.name, client)
            }
            Err(_retired) => {
                option::encode_reply(
                    out,
                    option,
                    NBD_REP_ERR_SHUTDOWN,
                    &[b"the export is being removed"],
                );
                Decision::Continue
            }
        }
    }

    fn transmit(&self, name: &str, client: ConnectedClient) -> Decision {
        // Contexts selected for another export are void.
        let base_allocation =
            self.structured_replies && self.base_allocation_for.as_deref() == Some(name);
        Decision::Transmit(Agreement {
            client,
            structured_replies: self.structured_replies,
            base_allocation,
        })
    }

    fn info(
        &self,
        exports: &dyn Exports,
        option: u32,
        request: &InfoRequest<'_>,
        out: &mut Vec<u8>,
    ) {
        if self.info_replies(exports, option, request, out).is_some() {
            option::encode_reply(out, option, NBD_REP_ACK, &[]);
        }
    }

    /// The replies before the final one; where the export is unknown, the final error.
    fn info_replies(
        &self,
        exports: &dyn Exports,
        option: u32,
        request: &InfoRequest<'_>,
        out: &mut Vec<u8>,
    ) -> Option<Arc<Export>> {
        let Some(export) = exports.find(request.name) else {
            option::encode_reply(out, option, NBD_REP_ERR_UNKNOWN, &[b"no such export"]);
            return None;
        };
        let device = export.device();
        option::encode_info_export(
            out,
            option,
            device.length(),
            self.transmission_flags(&export),
        );
        if request.wants_name {
            option::encode_info_text(out, option, NBD_INFO_NAME, export.name());
        }
        if request.wants_description && !export.description().is_empty() {
            option::encode_info_text(out, option, NBD_INFO_DESCRIPTION, export.description());
        }
        if request.wants_block_size {
            let preferred = device
                .block_size_preferred()
                .next_power_of_two()
                .clamp(512, REQUEST_PAYLOAD_MAX);
            option::encode_info_block_size(
                out,
                option,
                BLOCK_SIZE_MIN,
                preferred,
                REQUEST_PAYLOAD_MAX,
            );
        }
        Some(export)
    }

    fn list_meta_context(
        &self,
        exports: &dyn Exports,
        option: u32,
        request: &MetaRequest<'_>,
        out: &mut Vec<u8>,
    ) {
        if !self.meta_allowed(exports, option, request, out) {
            return;
        }
        if request.queries == 0 || request.names_base_allocation || request.names_base_namespace {
            option::encode_meta_context(out, option, 0, BASE_ALLOCATION);
        }
        option::encode_reply(out, option, NBD_REP_ACK, &[]);
    }

    fn set_meta_context(
        &mut self,
        exports: &dyn Exports,
        option: u32,
        request: &MetaRequest<'_>,
        out: &mut Vec<u8>,
    ) {
        // A new selection replaces the former one, also where it fails.
        self.base_allocation_for = None;
        if !self.meta_allowed(exports, option, request, out) {
            return;
        }
        if request.names_base_allocation {
            self.base_allocation_for = Some(request.name.to_owned());
            option::encode_meta_context(out, option, BASE_ALLOCATION_ID, BASE_ALLOCATION);
        }
        option::encode_reply(out, option, NBD_REP_ACK, &[]);
    }

    fn meta_allowed(
        &self,
        exports: &dyn Exports,
        option: u32,
        request: &MetaRequest<'_>,
        out: &mut Vec<u8>,
    ) -> bool {
        if !self.structured_replies {
            option::encode_reply(
                out,
                option,
                NBD_REP_ERR_INVALID,
                &[b"negotiate structured replies first"],
            );
            return false;
        }
        if exports.find(request.name).is_none() {
            option::encode_reply(out, option, NBD_REP_ERR_UNKNOWN, &[b"no such export"]);
            return false;
        }
        true
    }

    fn transmission_flags(&self, export: &Export) -> u16 {
        let mut flags = NBD_FLAG_HAS_FLAGS
            | NBD_FLAG_SEND_FLUSH
            | NBD_FLAG_SEND_FUA
            | NBD_FLAG_CAN_MULTI_CONN
            | NBD_FLAG_SEND_CACHE;
        if export.read_only() {
            flags |= NBD_FLAG_READ_ONLY;
        } else {
            flags |= NBD_FLAG_SEND_TRIM | NBD_FLAG_SEND_WRITE_ZEROES | NBD_FLAG_SEND_FAST_ZERO;
        }
        if self.structured_replies {
            flags |= NBD_FLAG_SEND_DF;
        }
        flags
    }
}

//! An NBD server as a library: everything that speaks the Network Block Device protocol can attach
//! what implements [`Export`].
//!
//! * [`codec`] and [`handshake`] are pure: bytes in, bytes out, no runtime.
//! * [`session`] drives one connection over any stream; [`listener`] accepts connections.
//! * [`memory`] is an export in memory, for tests and trials.
//!
//! Sections named in quotes are those of the NBD specification, `doc/proto.md` of
//! <https://github.com/NetworkBlockDevice/nbd>.

pub mod codec;
pub mod consts;
pub mod errno;
pub mod export;
pub mod handshake;
pub mod listener;
pub mod memory;
mod seats;
pub mod session;
pub mod tls;
mod transmission;

pub use errno::{Errno, Fault};
pub use export::{
    BlockSizes, Certificate, Client, Export, ExportInfo, Exports, Extent, Listed, OpenError, Piece,
    Purpose, ZeroOptions,
};
pub use handshake::TlsPolicy;
pub use listener::{ListenError, NbdAddr, NbdListener};
pub use session::{EndReason, Limits, Server};

//! `endio attach`: how ordinary NBD clients reach a volume.

use std::path::Path;

use endio_api::writeback::VolumeRequest;
use endio_nbd::NbdAddr;
use serde_json::json;

use crate::{args::AttachArgs, client::Client, failure::Outcome, output::Output};

/// Prints the commands for a volume; the volume must exist, the NBD server is not asked.
pub(crate) async fn run(client: &Client, out: Output, args: AttachArgs) -> Outcome {
    let AttachArgs { volume, nbd } = args;
    let known = client.volumes().get(VolumeRequest { name: volume.clone() }).await;
    known.map_err(|error| client.failure(format!("attach volume {volume}"), &error))?;
    let uri = nbd.uri(&volume);
    let has_kernel_nbd = Path::new("/dev/nbd0").exists();
    let lines = commands(&nbd, &volume, has_kernel_nbd);
    let listed: Vec<_> =
        lines.iter().map(|(why, line)| json!({ "for": why, "command": line })).collect();
    let value = json!({ "uri": uri, "kernel_nbd": has_kernel_nbd, "commands": listed });
    out.print(&value, || {
        let mut text = format!("{uri}\n");
        for (purpose, line) in &lines {
            text.push_str(&format!("\n# {purpose}\n{line}"));
        }
        text
    })
}

/// What each line is for, and the line.
fn commands(nbd: &NbdAddr, volume: &str, has_kernel_nbd: bool) -> Vec<(&'static str, String)> {
    let uri = quoted(&nbd.uri(volume));
    let mut lines = Vec::new();
    if has_kernel_nbd {
        let server = match nbd {
            NbdAddr::Tcp(address) => format!("{} {}", address.ip(), address.port()),
            NbdAddr::Unix(path) => format!("-unix {}", quoted(&path.to_string_lossy())),
        };
        let name = quoted(volume);
        lines.push(("a block device", format!("nbd-client -N {name} -persist {server} /dev/nbd0")));
    }
    lines.extend([
        ("what it is", format!("nbdinfo {uri}")),
        ("its map", format!("nbdinfo --map=endio:state {uri}")),
        ("copy a disk image in", format!("qemu-img convert -n -f raw -O raw disk.img {uri}")),
        ("a virtual machine", format!("qemu-system-x86_64 -drive file={uri},format=raw,if=virtio")),
        ("a file, without the kernel's nbd", format!("nbdfuse mountpoint/disk {uri}")),
        (
            "load, verified",
            format!(
                "fio --name=verify --ioengine=nbd --uri={uri} --rw=randwrite --bs=4k --size=64m \
                 --iodepth=16 --verify=crc32c"
            ),
        ),
    ]);
    lines
}

/// A word for a shell.
fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-._~/:=%[]@+".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_client_is_named_only_where_the_kernel_has_nbd() {
        let nbd: NbdAddr = "127.0.0.1:10809".parse().unwrap();
        let kernel = |has| commands(&nbd, "vol1", has).iter().any(|(_, l)| l.contains("/dev/nbd0"));
        assert!(kernel(true));
        assert!(!kernel(false));
        let (_, line) = &commands(&nbd, "vol1", true)[0];
        assert_eq!(line, "nbd-client -N vol1 -persist 127.0.0.1 10809 /dev/nbd0");
    }

    #[test]
    fn a_uri_of_a_unix_socket_is_quoted_for_the_shell() {
        let nbd: NbdAddr = "unix:/run/endio.sock".parse().unwrap();
        let lines = commands(&nbd, "my vol", false);
        assert!(
            lines.iter().all(|(_, l)| l.contains("'nbd+unix:///my%20vol?socket=/run/endio.sock'"))
        );
        assert_eq!(quoted("it's"), "'it'\\''s'");
    }
}

//! `endio attach`: how ordinary NBD clients reach a volume, and the kernel's one started.

use std::net::{IpAddr, SocketAddr};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use endio_api::writeback::{NbdTls, StatusRequest, VolumeRequest};
use endio_nbd::NbdAddr;
use serde_json::json;

use crate::args::AttachArgs;
use crate::client::Client;
use crate::failure::{Exit, Failure, Outcome};
use crate::output::Output;

/// Where the kernel shows its block devices.
const SYS_BLOCK: &str = "/sys/block";

/// A way to a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Target {
    address: NbdAddr,
    volume: String,
    read_only: bool,
    /// Directory with ca-cert.pem, client-cert.pem and client-key.pem, where TLS is spoken.
    tls: Option<PathBuf>,
}

/// Prints the commands for a volume, or starts the kernel's client. The volume must exist.
pub(crate) async fn run(client: &Client, out: Output, args: AttachArgs) -> Outcome {
    let AttachArgs { volume, nbd, read_only, tls_certificates, run } = args;
    let what = format!("attach volume {volume}");
    let known = client.volumes().get(VolumeRequest { name: volume.clone() }).await;
    known.map_err(|error| client.failure(what.clone(), &error))?;
    let status = client.inspect().status(StatusRequest::default()).await;
    let status = status.map_err(|error| client.failure(what.clone(), &error))?.into_inner();
    let listeners = status.nbd.iter().filter_map(|listener| {
        let address = reachable(listener.address.parse().ok()?, client.endpoint());
        Some((address, listener.tls()))
    });
    let mut found: Vec<(NbdAddr, NbdTls)> = listeners.collect();
    if let Some(own) = nbd {
        let tls = found.first().map_or(NbdTls::Off, |(_, tls)| *tls);
        found = vec![(own, tls)];
    }
    if found.is_empty() {
        let message = "this writeback serves no NBD clients";
        return Err(Failure::new(Exit::Failed, what, message)
            .help("start it with --nbd-listen 127.0.0.1:10809, or name another one with --nbd"));
    }
    let target = |(address, tls): (NbdAddr, NbdTls)| {
        let wants_tls = tls == NbdTls::Required || tls_certificates.is_some();
        let directory = tls_certificates.clone().unwrap_or_else(|| "CERTIFICATES".into());
        let tls = wants_tls.then_some(directory);
        Target { address, volume: volume.clone(), read_only, tls }
    };
    let targets: Vec<Target> = found.into_iter().map(target).collect();
    if run {
        return Err(start(&targets[0], &what, tls_certificates.is_none()));
    }
    tell(out, &targets)
}

fn tell(out: Output, targets: &[Target]) -> Outcome {
    let has_kernel_nbd = Path::new(SYS_BLOCK).join("nbd0").exists();
    let all: Vec<_> =
        targets.iter().map(|target| (target, target.commands(has_kernel_nbd))).collect();
    let listed = all.iter().flat_map(|(_, lines)| lines);
    let listed: Vec<_> = listed.map(|(why, line)| json!({ "for": why, "command": line })).collect();
    let uris: Vec<_> = targets.iter().map(|target| target.uri(false)).collect();
    let value = json!({
        "uri": uris[0], "uris": uris, "kernel_nbd": has_kernel_nbd, "commands": listed,
    });
    out.print(&value, || {
        let mut text = String::new();
        for (target, lines) in &all {
            text.push_str(&format!("{}\n", target.uri(false)));
            for (purpose, line) in lines {
                text.push_str(&format!("\n# {purpose}\n{line}"));
            }
        }
        text
    })
}

/// Becomes the kernel's client on the first free device; returns only why it cannot.
fn start(target: &Target, what: &str, lacks_certificates: bool) -> Failure {
    let failed = |message: &str, help: &str| {
        Failure::new(Exit::Failed, what, message.to_owned()).help(help.to_owned())
    };
    if target.tls.is_some() && lacks_certificates {
        return failed("the server wants TLS", "name the certificates with --tls-certificates");
    }
    let Some(device) = free_device(Path::new(SYS_BLOCK)) else {
        return failed(
            "this kernel has no free /dev/nbdN",
            "`modprobe nbd` loads its nbd where there is one; else use a line of `endio attach`",
        );
    };
    let arguments = target.kernel_arguments(&device);
    eprintln!("nbd-client {}", arguments.join(" "));
    let error = Command::new("nbd-client").args(&arguments).exec();
    failed(&format!("nbd-client cannot be started: {error}"), "install the package nbd-client")
}

/// The first network block device that nobody uses.
fn free_device(sys_block: &Path) -> Option<String> {
    let is_free = |name: &String| {
        let directory = sys_block.join(name);
        directory.exists() && !directory.join("pid").exists()
    };
    (0..256).map(|number| format!("nbd{number}")).find(is_free).map(|name| format!("/dev/{name}"))
}

/// The address as this machine reaches it: a server that listens on every address is where its gRPC
/// endpoint is.
fn reachable(address: NbdAddr, endpoint: &str) -> NbdAddr {
    match address {
        NbdAddr::Tcp(socket) if socket.ip().is_unspecified() => {
            let host = endpoint.rsplit('/').next().unwrap_or_default();
            let host = host.rsplit_once(':').map_or(host, |(host, _)| host);
            let host = host.trim_start_matches('[').trim_end_matches(']');
            let loopback = IpAddr::from([127, 0, 0, 1]);
            NbdAddr::Tcp(SocketAddr::new(host.parse().unwrap_or(loopback), socket.port()))
        }
        other => other,
    }
}

impl Target {
    /// Name of the export. `is_single`: the client has one connection, and a new one replaces it.
    fn export(&self, is_single: bool) -> String {
        match (self.read_only, is_single) {
            (true, _) => format!("{}@ro", self.volume),
            (false, true) => format!("{}@single", self.volume),
            (false, false) => self.volume.clone(),
        }
    }

    fn uri(&self, is_single: bool) -> String {
        let plain = self.address.uri(&self.export(is_single));
        let Some(directory) = &self.tls else { return plain };
        let mark = if plain.contains('?') { '&' } else { '?' };
        let secret = plain.replacen("nbd", "nbds", 1);
        format!("{secret}{mark}tls-certificates={}", directory.display())
    }

    fn kernel_arguments(&self, device: &str) -> Vec<String> {
        let mut arguments = vec!["-N".to_owned(), self.export(true), "-persist".to_owned()];
        if let Some(directory) = &self.tls {
            for (option, file) in [
                ("-cacertfile", "ca-cert.pem"),
                ("-certfile", "client-cert.pem"),
                ("-keyfile", "client-key.pem"),
            ] {
                arguments.extend([option.to_owned(), directory.join(file).display().to_string()]);
            }
        }
        match &self.address {
            NbdAddr::Tcp(address) => {
                arguments.extend([address.ip().to_string(), address.port().to_string()]);
            }
            NbdAddr::Unix(path) => {
                arguments.extend(["-unix".to_owned(), path.display().to_string()]);
            }
        }
        arguments.push(device.to_owned());
        arguments
    }

    /// The volume as QEMU's programs name it: options before the image, and the image.
    fn qemu(&self, is_single: bool) -> (String, String) {
        let Some(directory) = &self.tls else {
            let uri = quoted(&self.uri(is_single));
            return (String::new(), uri);
        };
        let directory = directory.display();
        let credentials = format!("tls-creds-x509,id=tls0,endpoint=client,dir={directory}");
        let server = match &self.address {
            NbdAddr::Tcp(address) => {
                let (host, port) = (address.ip(), address.port());
                format!("server.type=inet,server.host={host},server.port={port}")
            }
            NbdAddr::Unix(path) => format!("server.type=unix,server.path={}", path.display()),
        };
        let export = self.export(is_single);
        let image = format!(
            "driver=raw,file.driver=nbd,file.export={export},file.tls-creds=tls0,file.{}",
            server.replace(",server", ",file.server")
        );
        (format!(" --object {}", quoted(&credentials)), quoted(&image))
    }

    /// What each line is for, and the line.
    fn commands(&self, has_kernel_nbd: bool) -> Vec<(&'static str, String)> {
        let uri = quoted(&self.uri(false));
        let mut lines = Vec::new();
        if has_kernel_nbd {
            let words = self.kernel_arguments("/dev/nbd0");
            let words: Vec<String> = words.iter().map(|word| quoted(word)).collect();
            lines.push(("a block device", format!("nbd-client {}", words.join(" "))));
        }
        lines.extend([
            ("what it is", format!("nbdinfo {uri}")),
            ("its map", format!("nbdinfo --map=endio:state {uri}")),
            ("a file, without the kernel's nbd", format!("nbdfuse mountpoint/disk {uri}")),
        ]);
        let (object, image) = self.qemu(false);
        let copy = match (&self.tls, self.read_only) {
            (None, false) => format!("qemu-img convert -n -f raw -O raw disk.img {image}"),
            (None, true) => format!("qemu-img convert -f raw -O qcow2 {image} copy.qcow2"),
            (Some(_), false) => {
                format!("qemu-img convert -n{object} --target-image-opts -f raw disk.img {image}")
            }
            (Some(_), true) => {
                format!("qemu-img convert{object} --image-opts -O qcow2 {image} copy.qcow2")
            }
        };
        lines.push(("copy a disk image", copy));
        let (object, image) = self.qemu(true);
        let read_only = if self.read_only { ",read-only=on" } else { "" };
        let machine = match &self.tls {
            None => format!("-drive file={image},format=raw,if=virtio{read_only}"),
            Some(_) => format!(
                "{} -blockdev {image},node-name=disk{read_only} -device virtio-blk,drive=disk",
                object.replace(" --object", "-object")
            ),
        };
        lines.push(("a virtual machine", format!("qemu-system-x86_64 {machine}")));
        if !self.read_only {
            let load = format!(
                "fio --name=verify --ioengine=nbd --uri={uri} --rw=randwrite --bs=4k --size=64m \
                 --iodepth=16 --verify=crc32c"
            );
            lines.push(("load, verified", load));
        }
        lines
    }
}

/// A word for a shell.
fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-._~/:=%[]@+,".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn target(address: &str) -> Target {
        let address = address.parse().unwrap();
        Target { address, volume: "vol1".to_owned(), read_only: false, tls: None }
    }

    #[test]
    fn the_kernels_client_is_named_only_where_the_kernel_has_nbd() {
        let target = target("127.0.0.1:10809");
        let kernel = |has| target.commands(has).iter().any(|(_, l)| l.contains("/dev/nbd0"));
        assert!(kernel(true));
        assert!(!kernel(false));
        let (_, line) = &target.commands(true)[0];
        assert_eq!(line, "nbd-client -N vol1@single -persist 127.0.0.1 10809 /dev/nbd0");
    }

    #[test]
    fn a_uri_of_a_unix_socket_is_quoted_for_the_shell() {
        let mut target = target("unix:/run/endio.sock");
        target.volume = "my vol".to_owned();
        let line = &target.commands(false)[0].1;
        assert_eq!(line, "nbdinfo 'nbd+unix:///my%20vol?socket=/run/endio.sock'");
        assert_eq!(quoted("it's"), "'it'\\''s'");
    }

    #[test]
    fn with_tls_every_line_says_where_the_certificates_are() {
        for address in ["127.0.0.1:10809", "unix:/run/endio.sock"] {
            let mut target = target(address);
            target.tls = Some("/pki".into());
            for (why, line) in target.commands(true) {
                assert!(line.contains("/pki"), "{why}: {line}");
            }
        }
        let mut target = target("127.0.0.1:1");
        target.tls = Some("/pki".into());
        assert_eq!(target.uri(false), "nbds://127.0.0.1:1/vol1?tls-certificates=/pki");
    }

    #[test]
    fn a_volume_that_is_attached_read_only_is_named_so_in_every_line() {
        let mut target = target("127.0.0.1:10809");
        target.read_only = true;
        for (why, line) in target.commands(true) {
            let names = line.contains("vol1@ro") || line.contains("vol1%40ro");
            assert!(names, "{why}: {line}");
        }
    }

    #[test]
    fn a_server_on_every_address_is_where_its_endpoint_is() {
        let reach = |address: &str, endpoint| reachable(address.parse().unwrap(), endpoint);
        let any = "0.0.0.0:10809";
        assert_eq!(reach(any, "http://10.1.2.3:7400").to_string(), "10.1.2.3:10809");
        assert_eq!(reach("[::]:9", "http://[fe80::1]:7400").to_string(), "[fe80::1]:9");
        assert_eq!(reach(any, "http://localhost:7400").to_string(), "127.0.0.1:10809");
        assert_eq!(reach("10.0.0.9:1", "http://10.1.2.3:7400").to_string(), "10.0.0.9:1");
    }

    #[test]
    fn the_first_device_without_a_process_is_free() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(free_device(directory.path()), None);
        for name in ["nbd0", "nbd1", "nbd2"] {
            std::fs::create_dir(directory.path().join(name)).unwrap();
        }
        std::fs::write(directory.path().join("nbd0/pid"), "1").unwrap();
        assert_eq!(free_device(directory.path()).as_deref(), Some("/dev/nbd1"));
    }
}

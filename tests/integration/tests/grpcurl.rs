//! Every grpcurl line of the documents is carried out, as grpcurl would: what services there are, and
//! how their messages look, is asked of the server by reflection.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use bytes::BufMut as _;
use endio_integration_tests::hostile::channel;
use endio_integration_tests::stack::Stack;
use prost::Message as _;
use prost_reflect::{DescriptorPool, DynamicMessage, MethodDescriptor, SerializeOptions};
use prost_types::{FileDescriptorProto, FileDescriptorSet};
use tonic::client::Grpc;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::transport::Channel;
use tonic::{Request, Status};
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

/// A command of a document.
#[derive(Debug, PartialEq)]
struct Line {
    /// Where it stands, for messages.
    place: String,
    /// `-d`
    data: Option<String>,
    address: String,
    /// `list`, `describe` or a method; and what follows.
    what: Vec<String>,
}

/// The words of a shell command; quotes keep blanks together.
fn words(command: &str) -> Vec<String> {
    let (mut words, mut word, mut quote, mut is_word) = (Vec::new(), String::new(), None, false);
    for c in command.chars() {
        match (c, quote) {
            ('\'' | '"', None) => (quote, is_word) = (Some(c), true),
            (c, Some(q)) if c == q => quote = None,
            (c, None) if c.is_whitespace() => {
                if is_word {
                    words.push(std::mem::take(&mut word));
                    is_word = false;
                }
            }
            (c, _) => {
                word.push(c);
                is_word = true;
            }
        }
    }
    assert_eq!(quote, None, "a quote is open: {command}");
    words.extend(is_word.then_some(word));
    words
}

/// Understands the flags that the documents use; another one is an error, so that no line counts as
/// carried out that was not.
fn parse(place: &str, command: &str) -> Line {
    let mut words = words(command).into_iter().skip(1).peekable();
    let mut data = None;
    let mut is_plaintext = false;
    while let Some(flag) = words.next_if(|word| word.starts_with('-')) {
        match flag.as_str() {
            "-plaintext" => is_plaintext = true,
            "-d" => data = Some(words.next().expect("-d has a value")),
            // Which certificates are used is tested elsewhere; the stack here is plain.
            "-cacert" | "-cert" | "-key" | "-authority" | "-servername" => {
                is_plaintext = true;
                words.next().expect("a file or a name");
            }
            other => panic!("{place}: this test does not know the flag {other}"),
        }
    }
    assert!(is_plaintext, "{place}: neither -plaintext nor certificates: {command}");
    let address = words.next().unwrap_or_else(|| panic!("{place}: no address: {command}"));
    let what: Vec<String> = words.collect();
    assert!(!what.is_empty(), "{place}: nothing to do: {command}");
    Line { place: place.to_owned(), data, address, what }
}

/// The commands of a text: from lines that begin with `grpcurl`, in comments too; a backslash at the
/// end goes on in the next line.
fn lines(name: &str, text: &str) -> Vec<Line> {
    let bare = |line: &str| {
        let line = line.trim();
        line.strip_prefix("//").unwrap_or(line).trim_start_matches(['/', ' ', '$']).to_owned()
    };
    let mut found = Vec::new();
    let mut rest = text.lines().zip(1..);
    while let Some((line, number)) = rest.next() {
        let mut command = bare(line);
        if !command.starts_with("grpcurl ") {
            continue;
        }
        while let Some(begun) = command.strip_suffix('\\') {
            let (next, _) = rest.next().expect("a line after a backslash");
            command = format!("{begun} {}", bare(next));
        }
        found.push(parse(&format!("{name}:{number}"), &command));
    }
    found
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

/// Files with that ending below a directory, in order of their names.
fn files(directory: &Path, ending: &str, depth: usize) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let mut paths: Vec<PathBuf> = entries.collect();
    paths.sort();
    let mut found = Vec::new();
    for path in paths {
        if path.is_dir() && depth > 0 {
            found.extend(files(&path, ending, depth - 1));
        } else if path.extension().is_some_and(|extension| extension == ending) {
            found.push(path);
        }
    }
    found
}

fn documented() -> Vec<Line> {
    let root = root();
    let mut documents = files(&root, "md", 0);
    documents.extend(files(&root.join("docs"), "md", 2));
    documents.extend(files(&root.join("proto"), "proto", 4));
    let mut found = Vec::new();
    for path in documents {
        let name = path.strip_prefix(&root).unwrap().display().to_string();
        found.extend(lines(&name, &std::fs::read_to_string(&path).unwrap()));
    }
    found
}

/// Messages of types that are known only at run time.
#[derive(Clone)]
struct Dynamic(MethodDescriptor);

impl Encoder for Dynamic {
    type Item = DynamicMessage;
    type Error = Status;
    fn encode(&mut self, item: DynamicMessage, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        to.put_slice(&item.encode_to_vec());
        Ok(())
    }
}

impl Decoder for Dynamic {
    type Item = DynamicMessage;
    type Error = Status;
    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<DynamicMessage>, Status> {
        let decoded = DynamicMessage::decode(self.0.output(), from);
        decoded.map(Some).map_err(|error| Status::internal(error.to_string()))
    }
}

impl Codec for Dynamic {
    type Encode = DynamicMessage;
    type Decode = DynamicMessage;
    type Encoder = Self;
    type Decoder = Self;
    fn encoder(&mut self) -> Self {
        self.clone()
    }
    fn decoder(&mut self) -> Self {
        self.clone()
    }
}

/// What the server says about itself.
struct Reflected {
    client: ServerReflectionClient<Channel>,
}

impl Reflected {
    async fn ask(&mut self, what: MessageRequest) -> Result<MessageResponse, Status> {
        let request = ServerReflectionRequest { host: String::new(), message_request: Some(what) };
        let answers = self.client.server_reflection_info(tokio_stream::iter([request])).await;
        let answer = answers?.into_inner().message().await?.expect("an answer to each request");
        Ok(answer.message_response.expect("an answer of a kind"))
    }

    async fn services(&mut self) -> BTreeSet<String> {
        match self.ask(MessageRequest::ListServices(String::new())).await.unwrap() {
            MessageResponse::ListServicesResponse(list) => {
                list.service.into_iter().map(|service| service.name).collect()
            }
            other => panic!("{other:?}"),
        }
    }

    async fn files(&mut self, what: MessageRequest) -> Option<Vec<FileDescriptorProto>> {
        match self.ask(what).await {
            Ok(MessageResponse::FileDescriptorResponse(found)) => Some(
                found
                    .file_descriptor_proto
                    .iter()
                    .map(|bytes| FileDescriptorProto::decode(bytes.as_slice()).unwrap())
                    .collect(),
            ),
            Ok(MessageResponse::ErrorResponse(_)) => None,
            // What this server says of a symbol that it does not have.
            Err(status) if status.code() == tonic::Code::NotFound => None,
            other => panic!("{other:?}"),
        }
    }

    /// The file that defines a symbol, and all that it needs. `None`: the server does not know it.
    async fn pool(&mut self, symbol: &str) -> Option<DescriptorPool> {
        let by_symbol = MessageRequest::FileContainingSymbol(symbol.to_owned());
        let mut files = self.files(by_symbol).await?;
        let mut at = 0;
        while at < files.len() {
            for name in files[at].dependency.clone() {
                if !files.iter().any(|file| file.name() == name) {
                    let more = self.files(MessageRequest::FileByFilename(name)).await;
                    files.extend(more.expect("the server has what its files import"));
                }
            }
            at += 1;
        }
        let mut pool = DescriptorPool::new();
        pool.add_file_descriptor_set(FileDescriptorSet { file: files }).unwrap();
        Some(pool)
    }
}

/// Calls a method with JSON, as `grpcurl -d`; the answers as JSON.
async fn call(
    channel: &Channel,
    method: &MethodDescriptor,
    json: &str,
) -> Result<Vec<serde_json::Value>, String> {
    let mut reader = serde_json::Deserializer::from_str(json);
    let message = DynamicMessage::deserialize(method.input(), &mut reader);
    let message = message.map_err(|error| format!("the JSON does not fit: {error}"))?;
    reader.end().map_err(|error| format!("after the JSON: {error}"))?;
    let path = format!("/{}/{}", method.parent_service().full_name(), method.name());
    let path = http::uri::PathAndQuery::try_from(path).unwrap();
    let codec = Dynamic(method.clone());
    let mut client = Grpc::new(channel.clone());
    client.ready().await.map_err(|error| error.to_string())?;
    let mut answers = Vec::new();
    if method.is_client_streaming() {
        return Err("no document calls a method that takes a stream".into());
    } else if method.is_server_streaming() {
        let stream = client.server_streaming(Request::new(message), path, codec).await;
        let mut stream = stream.map_err(|status| status.to_string())?.into_inner();
        while let Some(answer) = stream.message().await.map_err(|status| status.to_string())? {
            answers.push(answer);
        }
    } else {
        let answer = client.unary(Request::new(message), path, codec).await;
        answers.push(answer.map_err(|status| status.to_string())?.into_inner());
    }
    let options = SerializeOptions::new().use_proto_field_name(true);
    let json = |answer: DynamicMessage| {
        answer.serialize_with_options(serde_json::value::Serializer, &options).unwrap()
    };
    Ok(answers.into_iter().map(json).collect())
}

/// Does what the line says. The answers; what is wrong with the line or its call.
async fn run(url: &str, line: &Line) -> Result<Vec<serde_json::Value>, String> {
    let channel = channel(url);
    let mut server = Reflected { client: ServerReflectionClient::new(channel.clone()) };
    let words: Vec<&str> = line.what.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["list"] => Ok(server.services().await.into_iter().map(Into::into).collect()),
        ["list", service] => {
            let pool = server.pool(service).await.ok_or(format!("no service {service}"))?;
            let service = pool.get_service_by_name(service).ok_or("not a service")?;
            Ok(service.methods().map(|method| method.full_name().into()).collect())
        }
        ["describe", symbol] => {
            let pool = server.pool(symbol).await.ok_or(format!("no symbol {symbol}"))?;
            let is_known = pool.get_service_by_name(symbol).is_some()
                || pool.get_message_by_name(symbol).is_some()
                || pool.get_enum_by_name(symbol).is_some();
            is_known.then(|| vec![(*symbol).into()]).ok_or(format!("{symbol} is not in its file"))
        }
        [method] => {
            let (service, name) = method.rsplit_once('/').ok_or("SERVICE/METHOD is missing")?;
            let pool = server.pool(service).await.ok_or(format!("no service {service}"))?;
            let service = pool.get_service_by_name(service).ok_or("not a service")?;
            let found = service.methods().find(|method| method.name() == name);
            let found = found.ok_or(format!("{} has no {name}", service.full_name()))?;
            call(&channel, &found, line.data.as_deref().unwrap_or("{}")).await
        }
        other => Err(format!("what is {other:?}?")),
    }
}

/// The real ports in place of the documented ones.
fn url<'a>(stack: &'a Stack, line: &Line) -> &'a str {
    match line.address.rsplit(':').next() {
        Some("7400") => &stack.writeback.url,
        Some("7401") => &stack.conversion.url,
        Some("7402") => &stack.stores[0].url,
        _ => panic!("{}: no service has the address {}", line.place, line.address),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_documented_grpcurl_line_works() {
    let stack = Stack::start(1).await;
    let lines = documented();
    let of = |name: &str| lines.iter().filter(|line| line.place.starts_with(name)).count();
    assert!(of("README.md") >= 5 && of("proto/") >= 7, "lines went missing: {lines:#?}");
    // A document may use a volume that another one creates.
    let creates = |line: &&Line| line.what[0].ends_with("Volumes/Create");
    let (first, then): (Vec<_>, Vec<_>) = lines.iter().partition(creates);
    let mut faults = Vec::new();
    let mut read = Vec::new();
    for line in first.into_iter().chain(then) {
        match run(url(&stack, line), line).await {
            Ok(answers) if answers.is_empty() => faults.push(format!("{}: no answer", line.place)),
            Ok(answers) if line.what[0].ends_with("Io/Read") => read.extend(answers),
            Ok(_) => {}
            Err(fault) => faults.push(format!("{}: {fault}", line.place)),
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    // What was written by one line is read by another.
    assert!(!read.is_empty() && read.iter().all(|answer| answer["data"] == "aGVsbG8="), "{read:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stale_line_is_an_error() {
    let stack = Stack::start(1).await;
    let stale = [
        "list endio.writeback.v1.Nothing",
        "describe endio.writeback.v1.Nothing",
        "endio.writeback.v1.Volumes/Nothing",
        "endio.writeback.v1.Nothing/Create",
        "-d '{\"nothing\":1}' X endio.writeback.v1.Volumes/Get",
        "-d '{\"name\":1}' X endio.writeback.v1.Volumes/Get",
        "-d '{\"name\":\"never-created\"}' X endio.writeback.v1.Volumes/Get",
    ];
    for rest in stale {
        let rest = if rest.contains('X') {
            rest.replace('X', "127.0.0.1:7400")
        } else {
            format!("127.0.0.1:7400 {rest}")
        };
        let line = parse("here", &format!("grpcurl -plaintext {rest}"));
        let ran = run(url(&stack, &line), &line).await;
        assert!(ran.is_err(), "{rest}: {ran:?}");
    }
    let described = parse("here", "grpcurl -plaintext h:7400 describe endio.writeback.v1.Io");
    run(url(&stack, &described), &described).await.unwrap();
    let listed = parse("here", "grpcurl -plaintext h:7400 list endio.writeback.v1.Io");
    assert!(run(url(&stack, &listed), &listed).await.unwrap().len() >= 3);
}

#[test]
fn commands_are_found_with_their_quotes_and_over_several_lines() {
    let text = "text\n  //   grpcurl -plaintext -d '{\"a\": 1}' \\\n  //      h:1 S/M\ngrpcurl x";
    let found = lines("f", text.strip_suffix("grpcurl x").unwrap());
    let expected = Line {
        place: "f:2".into(),
        data: Some("{\"a\": 1}".into()),
        address: "h:1".into(),
        what: vec!["S/M".into()],
    };
    assert_eq!(found, [expected]);
}

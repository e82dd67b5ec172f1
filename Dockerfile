# The image of endio: the three services and the `endio` command. Which one a container runs is its
# command; docker-compose.yml and k8s/ show all of them.
#
#   docker build -t endio .
#   docker build --build-arg PROFILE=dev -t endio .     # builds faster, runs slower
#
# Needs no BuildKit. The dependencies are a layer of their own, which is built anew only when a
# Cargo.toml or Cargo.lock changes.
ARG RUST_IMAGE=rust:1-slim-bookworm
ARG RUNTIME_IMAGE=debian:bookworm-slim

# --- What is shipped, but for the binaries.
FROM ${RUNTIME_IMAGE} AS runtime
# Directories belong to the user, so that new named volumes do too: data, the own certificate, and what
# the authority of docker-compose.yml fills.
RUN install -d -o 65532 -g 65532 -m 0750 /var/lib/endio /var/lib/endio/data \
    && cd /var/lib/endio && install -d -o 65532 -g 65532 -m 0700 tls pki pki/authority \
        pki/conversion pki/block-store-1 pki/block-store-2 pki/writeback pki/operator
USER 65532:65532
WORKDIR /var/lib/endio
# Everything in one process, for a first look; keep the data with `-v endio:/var/lib/endio/data`.
# WITHOUT TLS: publish its ports on 127.0.0.1 only. docs/SECURITY.md tells how to secure it.
CMD ["endio", "up", "--data-dir", "/var/lib/endio/data", "--insecure-any-address", \
     "--grpc-listen", "0.0.0.0:7400", "--nbd-listen", "0.0.0.0:10809"]

# --- The workspace without its code: manifests, and an empty file for each target.
FROM ${RUNTIME_IMAGE} AS manifests
WORKDIR /workspace
COPY . .
RUN mkdir /manifests \
    && find . -name Cargo.toml -o -name Cargo.lock -o -name build.rs \
        -o -path '*/src/lib.rs' -o -path '*/src/main.rs' -o -path '*/src/bin/*.rs' > /list \
    && tar -cf - -T /list | tar -xf - -C /manifests \
    && cd /manifests \
    && find . -name '*.rs' ! -name lib.rs -exec sh -c 'echo "fn main() { }" > "$1"' _ {} \; \
    && find . -name lib.rs -exec sh -c ': > "$1"' _ {} \;

# --- The binaries.
FROM ${RUST_IMAGE} AS build
ARG PROFILE=release
WORKDIR /workspace
ENV CARGO_INCREMENTAL=0 CARGO_NET_RETRY=5
COPY --from=manifests /manifests .
RUN cargo build --locked --profile "${PROFILE}" --bins \
    -p endio-conversion -p endio-block-store -p endio-writeback -p endio-cli
COPY proto proto
COPY crates crates
COPY services services
COPY bench bench
COPY cli cli
# The real files are older than what was built from the empty ones: cargo must see them as changed.
RUN find crates services bench cli -name '*.rs' -exec touch {} + \
    && cargo build --locked --profile "${PROFILE}" --bins \
        -p endio-conversion -p endio-block-store -p endio-writeback -p endio-cli \
    && mkdir /out \
    && for name in endio endio-conversion endio-block-store endio-writeback; do \
        strip --strip-debug -o "/out/${name}" \
            "target/$([ "${PROFILE}" = dev ] && echo debug || echo "${PROFILE}")/${name}" || exit 1; \
    done

# --- What is shipped.
FROM runtime
COPY --from=build /out/ /usr/local/bin/

# The three programs with PostgreSQL and etcd from Debian's packages, in one image.
#
#   cargo build --release && docker build --target prebuilt -t trunkline .    the binaries of this machine (Debian 12)
#   docker build -t trunkline .                                               everything built inside
#
# Where no image registry can be reached: tools/base-image makes a base image from Debian's package archive, then
# add --build-arg BASE_IMAGE=trunkline/debian:12.
ARG BASE_IMAGE=debian:12-slim
ARG RUST_IMAGE=rust:1-slim-bookworm

FROM ${BASE_IMAGE} AS base
# No cluster of Debian's own: the agent makes the data directory. The packages' users (postgres, etcd) are used.
RUN set -eux; \
    mkdir -p /etc/postgresql-common/createcluster.d; \
    echo 'create_main_cluster = false' > /etc/postgresql-common/createcluster.d/trunkline.conf; \
    apt-get update; \
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends ca-certificates postgresql etcd-server; \
    rm -rf /var/lib/apt/lists/*; \
    install -d -o postgres -g postgres -m 0700 /var/lib/postgresql/data; \
    install -d /etc/trunkline
COPY docker/patroni.yml docker/router.yml /etc/trunkline/
EXPOSE 5432 8008 5000 5001 8080
STOPSIGNAL SIGTERM

FROM base AS prebuilt
COPY target/release/trunkline-agent target/release/trunkline-router target/release/trunklinectl /usr/local/bin/
USER postgres
CMD ["trunkline-agent", "/etc/trunkline/patroni.yml"]

FROM ${RUST_IMAGE} AS build
RUN apt-get update && apt-get install -y --no-install-recommends \
    gcc libc6-dev make protobuf-compiler libprotobuf-dev
WORKDIR /src
COPY . .
RUN cargo build --release --locked --package trunkline-agent --package trunkline-router --bins

FROM base AS source
COPY --from=build /src/target/release/trunkline-agent /src/target/release/trunkline-router /src/target/release/trunklinectl /usr/local/bin/
USER postgres
CMD ["trunkline-agent", "/etc/trunkline/patroni.yml"]

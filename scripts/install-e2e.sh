#!/bin/sh
# Installs what `make e2e` needs beside the virtual environment: a Docker engine, the compose plugin,
# debootstrap, Prometheus and its companions, Chromium, from Debian alone. Does what is not done yet; starts nothing.
set -eu

CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/offramp-e2e
PLUGIN=$CACHE/cli-plugins/docker-compose

work=$(mktemp -d)
policy=
trap 'rm -rf "$work"; [ -z "$policy" ] || rm -f "$policy"' EXIT
refuse() {
    echo "install-e2e: $1" >&2
    exit 1
}

. /etc/os-release 2>/dev/null || refuse "no /etc/os-release: this is for Debian"
[ "${ID:-}" = debian ] || refuse "this is for Debian, here is ${PRETTY_NAME:-another system}. \
On other systems: a Docker engine with compose, and docker compose up (docs/deploy-docker.md)"
[ "$(id -u)" = 0 ] || refuse "needs root, for apt-get and later for a Docker engine of its own"

wanted=
for package in docker.io iptables iproute2 debootstrap prometheus prometheus-alertmanager \
    prometheus-node-exporter chromium; do
    dpkg-query --show --showformat='${Status}' "$package" 2>/dev/null | grep -q ' installed$' ||
        wanted="$wanted $package"
done
if [ -n "$wanted" ]; then
    apt-get -qq update
    # Services of a test machine are started by tests: nothing may run on its own afterwards.
    if [ ! -e /usr/sbin/policy-rc.d ]; then
        policy=/usr/sbin/policy-rc.d
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod +x "$policy"
    fi
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 \
        install --yes --no-install-recommends $wanted >/dev/null
fi

if [ ! -x "$PLUGIN" ]; then
    # Compose in its second version is in no release of Debian up to 12: its package of the unstable
    # one, whose only file that counts runs anywhere, by way of a list of packages that apt sees here
    # and nowhere else.
    mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$CACHE/cli-plugins"
    # From wherever this machine has its own release from.
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' "Release: $VERSION_CODENAME" | head -n 1)
    [ -n "$mirror" ] || refuse "apt knows no source of Debian $VERSION_CODENAME"
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror sid main" >"$work/sources.list"
    apt="apt-get -qq -o Dir::Etc::sourcelist=$work/sources.list -o Dir::Etc::sourceparts=/dev/null \
        -o Dir::State::lists=$work/lists -o Dir::Cache=$work/cache -o APT::Sandbox::User=root"
    (
        cd "$work"
        $apt update
        $apt download docker-compose
        dpkg-deb --extract docker-compose_*.deb unpacked
    )
    cp "$work/unpacked/usr/libexec/docker/cli-plugins/docker-compose" "$PLUGIN.part"
    mv "$PLUGIN.part" "$PLUGIN"
fi
echo "e2e tools: $(/usr/bin/docker --version), $("$PLUGIN" version 2>/dev/null || echo 'docker compose')"

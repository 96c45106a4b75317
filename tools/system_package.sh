#!/bin/sh
# Makes sure that a program of the operating system is there: tools/system_package.sh chromium|c++|aarch64-c++|qemu-aarch64
# Installs it where that can be done (apt-get, as root); otherwise says what is missing and fails.
set -eu

case "$1" in
    chromium) names="chromium chromium-browser google-chrome"; package=chromium ;;
    c++) names="c++ g++ clang++"; package=g++ ;;
    aarch64-c++) names=aarch64-linux-gnu-g++; package=g++-aarch64-linux-gnu ;;
    qemu-aarch64) names=qemu-aarch64; package=qemu-user ;;
    *) echo "usage: $0 chromium|c++|aarch64-c++|qemu-aarch64" >&2; exit 2 ;;
esac
for name in $names; do
    if command -v "$name" >/dev/null; then exit 0; fi
done

missing() { echo "$package is missing and $1; please install it" >&2; exit 1; }
command -v apt-get >/dev/null || missing "there is no apt-get to install it with"
[ "$(id -u)" = 0 ] || missing "installing it takes root"
echo "installing $package ..."
export DEBIAN_FRONTEND=noninteractive
{ apt-get -q update && apt-get -q install -y --no-install-recommends "$package"; } >/dev/null </dev/null || missing "apt-get could not install it"

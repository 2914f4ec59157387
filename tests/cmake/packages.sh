# SPDX-License-Identifier: Apache-2.0
# Sourced by examples/quickstart.sh, tests/run.sh and .ci/run.
# install_packages PACKAGE...: says which of the Debian packages are missing and installs those.

install_packages() {
  if ! command -v dpkg-query >/dev/null 2>&1; then
    echo "Not a Debian system: nothing is installed. The Debian names of what is needed: $*"
    return 0
  fi
  packages_missing=
  for package do
    case $(dpkg-query --show --showformat='${Status}' "$package" 2>/dev/null) in
      "install ok installed") ;;
      *) packages_missing="$packages_missing $package" ;;
    esac
  done
  if [ -z "$packages_missing" ]; then
    echo "Needed Debian packages, all installed: $*"
    return 0
  fi
  echo "Installing Debian packages with apt-get:$packages_missing"
  echo "(--no-install leaves them out)"
  # The lists of a fresh machine are empty, those of an old one name files that are gone.
  # shellcheck disable=SC2086
  if apt-cache show $packages_missing >/dev/null 2>&1 && packages_apt install $packages_missing; then
    return 0
  fi
  # shellcheck disable=SC2086
  packages_apt update && packages_apt install $packages_missing
}

# Errors only: the progress of dpkg is longer than a test report.
packages_apt() {
  if [ "$1" = install ]; then
    shift
    set -- install --yes --no-install-recommends "$@"
  fi
  if [ "$(id -u)" -eq 0 ]; then
    DEBIAN_FRONTEND=noninteractive apt-get --quiet --quiet "$@" >/dev/null
  else
    sudo DEBIAN_FRONTEND=noninteractive apt-get --quiet --quiet "$@" >/dev/null
  fi
}

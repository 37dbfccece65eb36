#!/usr/bin/env bash
# Builds the images of docker/Dockerfile without a Docker engine and runs their checks: see --help.
set -euo pipefail

usage() {
  cat <<'TEXT'
tests/containers/build.sh [OPTION]...   as root: build docker/Dockerfile without a Docker engine, and check it

  --install          install what is missing with apt-get: buildah podman runc debootstrap
  --base pull        the base image python:3.11-slim from its registry
  --base debootstrap a stand-in of the same name, made of Debian's packages
  --base auto        the first if the registry can be reached, else the second (the default)
  --volume SPEC      HOST:CONTAINER:ro, seen by every step of the build and left out of the image: settings of pip,
                     certificates, package indices; may be repeated
  --build-arg A=B    argument of the Dockerfile, e.g. TORCH_INDEX=URL; may be repeated
  --check smoke      4 ranks train for seconds in the image
  --check tests      that, the serial tests, and the tests on 4 ranks over MPI (the default)
  --check all        that, and `make test`
  --save FILE        write the image that runs as an archive (docker load, podman load, apptainer build)
  --folder DIR       keep images and layers in DIR, where the next call finds them; without it they lie in a new folder
                     of /var/tmp, which is removed at the end
TEXT
}

fail() {
  echo "build.sh: $1" >&2
  exit 2
}

install=no base=auto check=tests save='' folder=''
options=()
while (($#)); do
  case $1 in
    --help) usage && exit ;;
    --install) install=yes && shift && continue ;;
    --base | --check | --save | --folder | --volume | --build-arg) (($# > 1)) || fail "$1 wants a value; see --help" ;;
    *) fail "$1 is no option; see --help" ;;
  esac
  case $1 in
    --base) base=$2 ;;
    --check) check=$2 ;;
    --save) save=$(realpath "$2") ;;
    --folder) folder=$(realpath "$2") ;;
    *) options+=("$1" "$2") ;;
  esac
  shift 2
done
case $base in auto | pull | debootstrap) ;; *) fail "--base $base is none of auto, pull, debootstrap; use auto" ;; esac
case $check in smoke | tests | all) ;; *) fail "--check $check is none of smoke, tests, all; use tests" ;; esac
[[ $(id -u) == 0 ]] || fail "user $(id -un) may not make images with chroot isolation; run as root"

tools=(buildah podman runc debootstrap)
missing=()
for tool in "${tools[@]}"; do command -v "$tool" > /dev/null || missing+=("$tool"); done
if ((${#missing[@]})); then
  [[ $install == yes ]] || fail "missing: ${missing[*]}; add --install, or apt-get install ${missing[*]}"
  apt-get update -q && apt-get install -q -y --no-install-recommends "${missing[@]}"
fi

# Images of our own, apart from those of the machine.
work=${folder:-$(mktemp -d /var/tmp/xbraid-containers.XXXXXX)}
mkdir -p "$work"
places=(--root "$work/storage" --runroot "$work/state")
clean() {
  if [[ $folder ]]; then
    echo "build.sh: kept: podman ${places[*]} images" >&2
    return
  fi
  podman "${places[@]}" rmi --all --force > /dev/null 2>&1 || true
  umount "$work/storage/overlay" 2> /dev/null || true
  rm -rf --one-file-system "$work"
}
trap clean EXIT

project=$(cd "$(dirname "$0")/../.." && pwd)
say() { printf '\n== %s (%s s)\n' "$*" "$SECONDS"; }

# The stand-in has what the slim image has: python and its headers, venv and pip, no compiler.
make_base() {
  rm -rf --one-file-system "$work/debian" # of a call that was interrupted
  local packages=python3,python3-venv,python3-dev,ca-certificates
  debootstrap --variant=minbase --include="$packages" bookworm "$work/debian" > "$work/debootstrap.log" ||
    { tail -n 20 "$work/debootstrap.log" >&2 && exit 1; }
  ln -s /usr/bin/python3 "$work/debian/usr/local/bin/python"
  rm -rf "$work/debian/var/cache/apt/archives" "$work/debian/var/lib/apt/lists"
  mkdir -p "$work/debian/var/cache/apt/archives/partial" "$work/debian/var/lib/apt/lists/partial"
  tar -C "$work/debian" -c . | podman "${places[@]}" import --change ENV=LANG=C.UTF-8 - python:3.11-slim
  rm -rf --one-file-system "$work/debian"
}

say "base image: $base"
if podman "${places[@]}" image exists python:3.11-slim; then
  echo "of an earlier call"
elif [[ $base == debootstrap ]]; then
  make_base
elif timeout 300 buildah "${places[@]}" pull python:3.11-slim; then
  :
elif [[ $base == auto ]]; then
  say "the registry cannot be reached: a stand-in of Debian's packages"
  make_base
else
  fail "--base pull, but the registry cannot be reached; use --base debootstrap"
fi

for target in runtime test; do
  say "build: $target"
  buildah "${places[@]}" bud --isolation chroot --network host --pull-never --layers --target "$target" \
    "${options[@]}" -f "$project/docker/Dockerfile" -t "xbraid_py:$target" "$project"
done

# No network inside. The limits that podman asks for by itself are higher than what runc may set in many places.
inside() {
  podman "${places[@]}" --runtime runc run --rm --network none --shm-size 256m \
    --ulimit nofile=4096 --ulimit nproc=4096 "$@"
}

say "what is in the image"
podman "${places[@]}" images
# shellcheck disable=SC2016  # for the shell inside
inside xbraid_py:runtime bash -ec '
  test "$(id -u)" != 0
  if command -v c++ g++ cc gcc; then exit 1; fi
  backend=$(python -c "import xbraid_py.kernels as kernels; print(kernels.BACKEND)")
  echo "user $(id -un), kernels: $backend"
  [[ $backend == native* ]]'

say "4 ranks train for seconds"
inside xbraid_py:runtime mpirun -n 4 python drivers/peaks.py --smoke --out /tmp/peaks

say "4 ranks of a program of the wheel"
inside --workdir /tmp xbraid_py:runtime bash -ec '
  xbraid-py run peaks --print | grep site-packages/xbraid_py/drivers/peaks.py
  xbraid-py run peaks --ranks 4 --smoke
  xbraid-py status runs/peaks'

if [[ $check != smoke ]]; then
  say "serial tests"
  inside xbraid_py:test python -m pytest -q
  say "tests on 4 ranks"
  inside xbraid_py:test mpirun -n 4 python -m mpi4py -m pytest -q --only-mpi -p no:cacheprovider
fi
if [[ $check == all ]]; then
  say "make test"
  inside xbraid_py:test
fi
if [[ $save ]]; then
  podman "${places[@]}" save -o "$save" xbraid_py:runtime
fi
say "all checks passed"

# Sourced by scripts/demo and scripts/test (bash): makes the checkout's .venv and builds the C half, only as far as something changed.
#
#   root=/path/of/the/checkout; . "$root/scripts/ground.sh"; ground dev     # or: ground run
#   "$venv/bin/nssup" ...

venv=$root/.venv
stamp=$venv/nssup.stamp
debian_packages=(python3 python3-venv python3-dev gcc libc6-dev procps util-linux)

fail() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

# The stamp's lines: the venv's place (it does not survive a move) and Python, the hash of what its packages rest on, that of what
# the C half rests on, and which extras are in.
python_now() {
    printf '%s ' "$root"
    "$venv/bin/python" -V 2>&1
}

packages_now() {
    cat "$root/pyproject.toml" "$root/scripts/nssup" | sha256sum
}

natives_now() {
    printf 'CC=%s NSSUP_INIT_CC=%s NSSUP_FAILPOINTS=%s ' "${CC-}" "${NSSUP_INIT_CC-}" "${NSSUP_FAILPOINTS-}"
    cat "$root/setup.py" "$root"/nssup/native/* | sha256sum
}

read_stamp() {
    stamped_python='' stamped_packages='' stamped_natives='' stamped_extras=''
    if [[ -r $stamp ]]; then
        { IFS= read -r stamped_python && IFS= read -r stamped_packages && IFS= read -r stamped_natives && IFS= read -r stamped_extras; } <"$stamp" || true
    fi
}

packages_fresh() { # packages_fresh EXTRAS
    [[ $stamped_python == "$(python_now)" && $stamped_packages == "$(packages_now)" && -x $venv/bin/nssup ]] &&
        [[ $1 == run || $stamped_extras == dev ]]
}

natives_fresh() {
    [[ $stamped_natives == "$(natives_now)" && -x $root/nssup/nssup-init && -e $root/nssup/_clone.abi3.so ]]
}

# Prints the real interpreter behind COMMAND (a pyenv shim costs 0.1 s a start), if it can make a venv and build an extension.
usable_python() {
    "$1" -I - 2>/dev/null <<'PYTHON'
import os, sys, sysconfig
assert sys.version_info >= (3, 11)
import ensurepip, venv
assert os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))
print(sys._base_executable)
PYTHON
}

find_python() {
    local name
    for name in python3 python3.14 python3.13 python3.12 python3.11 /usr/bin/python3; do
        if python=$(usable_python "$name"); then
            return
        fi
    done
    return 1
}

can_compile() {
    local compiler
    read -ra compiler <<<"${CC:-cc}"
    printf '#include <sys/types.h>\n' | "${compiler[@]}" -E -x c - >/dev/null 2>&1
}

has_all() {
    find_python && can_compile && type -P ps unshare >/dev/null
}

install_system_packages() {
    if ((EUID != 0)) || ! type -P apt-get >/dev/null; then
        fail "needs Python 3.11+ with venv and headers, a C compiler, ps and unshare; on Debian: apt-get install ${debian_packages[*]}"
    fi
    printf 'installing %s\n' "${debian_packages[*]}" >&2
    export DEBIAN_FRONTEND=noninteractive
    apt-get -qq update >/dev/null && apt-get -qq install --no-install-recommends --no-upgrade "${debian_packages[@]}" >/dev/null ||
        fail "apt-get could not install ${debian_packages[*]}"
    hash -r
    has_all || fail 'no Python 3.11 or newer with venv and headers, or no C compiler, even after apt-get install'
}

# -I: neither PYTHONPATH nor the user's own site-packages may leak in. PIP_USER would be refused in a venv.
pip_install() {
    PIP_USER=0 "$venv/bin/python" -I -m pip --disable-pip-version-check install -qq "$@" >&2
}

requirements() { # requirements EXTRAS
    "$venv/bin/python" -I - "$root/pyproject.toml" "$1" <<'PYTHON'
import sys, tomllib
with open(sys.argv[1], "rb") as file:
    config = tomllib.load(file)
extras = config["project"]["optional-dependencies"]
print(*config["build-system"]["requires"], *config["project"]["dependencies"], *extras.get(sys.argv[2], []), sep="\n")
PYTHON
}

# The kernel ends an interpreter's path at a space and cuts it at 255 bytes, and pip does not look at that for plain scripts.
mend_shebang() {
    local command=$venv/bin/nssup text
    if [[ $venv == *[[:space:]]* || ${#venv} -gt 100 ]]; then
        text=$(tail -n +2 "$command")
        printf "#!/bin/sh\n'''exec' \"%s\" \"\$0\" \"\$@\"\n' '''\n%s\n" "$venv/bin/python" "$text" >"$command"
    fi
}

venv_is_sound() {
    [[ -r $venv/nssup.home && $(<"$venv/nssup.home") == "$root" ]] && "$venv/bin/python" -I -m pip --version >/dev/null 2>&1
}

make_venv() {
    printf 'making .venv with %s\n' "$python" >&2
    rm -rf "$venv"
    "$python" -I -m venv "$venv" >&2 || fail "could not make $venv"
    printf '%s\n' "$root" >"$venv/nssup.home"
}

build_natives() {
    local log
    printf 'building nssup/_clone and nssup/nssup-init\n' >&2
    log=$(cd "$root" && "$venv/bin/python" -I setup.py --quiet build_ext --inplace 2>&1) || {
        printf '%s\n' "$log" >&2
        fail 'the C half does not build'
    }
}

install_packages() { # install_packages EXTRAS
    has_all || install_system_packages
    rm -f "$stamp"
    venv_is_sound || make_venv
    printf 'installing nssup and what it needs into .venv\n' >&2
    # Apart from nssup itself: C that does not compile must not cost the checkout its test tools.
    requirements "$1" >"$venv/nssup.requirements" && pip_install -r "$venv/nssup.requirements" ||
        fail 'pip could not install what nssup needs'
    build_natives # pip builds them once more, but would wrap a compiler's message in forty lines of its own
    pip_install --no-deps --no-build-isolation -e "$root" || fail 'pip could not install nssup'
    mend_shebang
}

set_up() { # set_up EXTRAS
    local extras=$1 packages natives
    flock 9
    read_stamp
    [[ $stamped_extras == dev ]] && extras=dev
    # Taken before the build: a file that changes meanwhile is built again next time.
    packages=$(packages_now) natives=$(natives_now)
    if ! packages_fresh "$extras"; then
        install_packages "$extras"
    elif ! natives_fresh; then
        build_natives
    fi
    printf '%s\n' "$(python_now)" "$packages" "$natives" "$extras" >"$stamp.new" && mv "$stamp.new" "$stamp"
}

ground() { # ground run|dev
    read_stamp
    if ! packages_fresh "$1" || ! natives_fresh; then
        [[ -w $root && ( ! -e $venv || -w $venv ) ]] || fail "must write to $root, which is not yours: make a checkout of your own"
        # The checkout itself is the lock: nothing to ignore, nothing to clean up.
        (set_up "$1") 9<"$root" || exit 1
    fi
}

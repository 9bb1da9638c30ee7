#!/bin/sh
# Installs what the tests of the cluster, of the database and of the reports need, on Debian or Ubuntu, as root.
# Does nothing where it is installed already, and starts no service.
set -eu

PATH=$PATH:/usr/sbin:/sbin
missing=
for program in slurmctld slurmd slurmdbd sbatch sacctmgr munged mariadbd mariadb-install-db shellcheck \
    chromium chromedriver; do
    command -v "$program" >/dev/null || missing="$missing $program"
done
set -- /usr/lib/postgresql/*/bin/initdb
[ -x "$1" ] || missing="$missing postgresql"
[ -n "$missing" ] || exit 0

if ! command -v apt-get >/dev/null || [ "$(id -u)" -ne 0 ]; then
    echo "The tests need these programs:$missing" >&2
    echo "On Debian or Ubuntu, run $0 as root; elsewhere, install Slurm with slurmdbd, munge," >&2
    echo "MariaDB, PostgreSQL and Chromium with its driver by hand." >&2
    exit 1
fi

# Debian's packages start their services unless this file says no
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends \
    slurmctld slurmd slurm-client slurmdbd munge mariadb-server postgresql shellcheck \
    chromium chromium-driver

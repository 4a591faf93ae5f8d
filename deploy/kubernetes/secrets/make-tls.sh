#!/usr/bin/env bash
# Makes an authority and one certificate signed by it, for a year: make-tls.sh DIRECTORY
set -euo pipefail
umask 077
mkdir -p "${1:?make-tls.sh DIRECTORY}"
cd "$1"
new=(openssl req -newkey rsa:3072 -nodes -sha256)
"${new[@]}" -x509 -days 365 -subj "/CN=dask-influence CA" -keyout ca.key -out ca.crt 2> /dev/null
"${new[@]}" -subj "/CN=dask-influence" -keyout tls.key -out tls.csr 2> /dev/null
openssl x509 -req -days 365 -sha256 -in tls.csr -CA ca.crt -CAkey ca.key -CAcreateserial -out tls.crt 2> /dev/null
rm tls.csr ca.srl
echo "kubectl -n dask-influence create secret generic dask-influence-tls \\"
echo "  --from-file=ca.crt=$PWD/ca.crt --from-file=tls.crt=$PWD/tls.crt --from-file=tls.key=$PWD/tls.key"
echo "Keep $PWD/ca.key away from the cluster: it signs."

// Package runtimes tests the built binary under the programs that people run containers with: podman, buildah, rootlesskit
// and rootless docker, in the lab that .ci/lab makes and draws.
//
// They run as the lab's ordinary user on the machine "host", and the tests look from there, from the machine
// "outside" and from the containers. It takes root on Debian to make the lab; elsewhere the tests are skipped.
package runtimes

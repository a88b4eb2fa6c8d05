//go:build cgo

package main

// cgoEnabled: there are threads that Go did not make and that AllThreadsSyscall does not reach.
const cgoEnabled = true

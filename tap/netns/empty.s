// Without an assembly file the compiler refuses functions without a body, which spawn.go
// declares for go:linkname.

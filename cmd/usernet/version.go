package main

import (
	"fmt"
	"runtime"
	"runtime/debug"
)

// version is set by the linker (-X main.version=...).
var version string

// versionText is the line that "usernet version" prints.
func versionText() string {
	return fmt.Sprintf("usernet %s %s %s/%s\n", ourVersion(), runtime.Version(), runtime.GOOS, runtime.GOARCH)
}

func ourVersion() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" && info.Main.Version != "(devel)" {
		return info.Main.Version
	}
	return "unknown"
}

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
	v := version
	if v == "" {
		v = "unknown"
		if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" && info.Main.Version != "(devel)" {
			v = info.Main.Version
		}
	}
	return fmt.Sprintf("usernet %s %s %s/%s\n", v, runtime.Version(), runtime.GOOS, runtime.GOARCH)
}

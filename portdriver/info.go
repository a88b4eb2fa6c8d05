package portdriver

// Info is what there is to say of a driver.
type Info struct {
	Path string `json:"path"` // what was asked for: auto, kernel or stack

	IPv4 *PathInfo `json:"ipv4,omitempty"` // absent: the container has no such address
	IPv6 *PathInfo `json:"ipv6,omitempty"`

	UDP  bool `json:"udp"`  // UDP ports can be published
	Auto bool `json:"auto"` // what listens in the container is published

	Forwards       int `json:"forwards"`       // now
	MaxForwards    int `json:"maxForwards"`    // by the limit of files
	Connections    int `json:"connections"`    // now, of TCP
	MaxConnections int `json:"maxConnections"` // by the limit of files
	Dials          int `json:"dials"`          // connections that wait for the container now
	MaxDials       int `json:"maxDials"`
	Files          int `json:"files"` // that forwards and connections may have
}

// PathInfo is what new TCP connections to the container's address of one family take.
type PathInfo struct {
	Path         string `json:"path"`                   // kernel or stack; empty: they are refused
	WhyNotKernel string `json:"whyNotKernel,omitempty"` // empty: they take it, with their source address

	// Loopback tells that servers on the container's loopback alone are reached, which only the kernel path does.
	Loopback bool `json:"loopback"`

	// Detours are forwards that take the stack path all the same, for now, as only by that they were answered; each one's Note has more.
	Detours int `json:"detours,omitempty"`
}

// Info tells how ports are published, and how many.
func (d *Driver) Info() Info {
	i := Info{
		Path: d.cfg.Path, UDP: d.cfg.UDP != nil,
		MaxForwards: d.limits.Forwards, MaxConnections: d.limits.Connections, MaxDials: d.limits.Dials, Files: d.limits.Files,
		Connections: int(d.connections.Load()), Dials: d.dials.count(),
	}
	d.mu.Lock()
	i.Forwards, i.Auto = len(d.forwards), len(d.autos) > 0
	d.mu.Unlock()
	i.IPv4, i.IPv6 = d.pathInfo(true), d.pathInfo(false)
	return i
}

func (d *Driver) pathInfo(v4 bool) *PathInfo {
	dst := d.addrs.container4
	if !v4 {
		dst = d.addrs.container6
	}
	if !dst.IsValid() {
		return nil
	}
	p := &PathInfo{Path: PathKernel, Loopback: d.noSockets() == nil}
	if why := d.whyNoKernel(dst); why != nil {
		p.WhyNotKernel = why.Error()
		switch {
		case d.stackLeads(dst):
			p.Path = PathStack
		case !p.Loopback:
			p.Path = ""
		}
	}
	for _, f := range d.all() {
		if f.onDetour(dst) != nil {
			p.Detours++
		}
	}
	return p
}

"""What every server of ours needs: who may ask, bodies that come slowly, sockets and an orderly end.

    strangers  names that a server answers to, pages of other sites, security headers
    bodies     a request's body, bounded in size and time
    listening  sockets, patience with slow clients, an orderly end

Knows nothing of what is served. Needs the extra `serve`.
"""
